"""The code that arXiv:2401.16405 measured, as far as its memory goes: its Table 3 replayed on the meta device.

Table 3 is the least limit, in whole GiB, at which 30 steps of Flan v2 succeed on an A100 (Appendix F): a micro-batch of
one row of up to 2,048 tokens, rank 64 or as many sparse entries. What was run then differs from this program's own
code: sparse values over a copy of each weight, the loss of transformers before 4.45 with its fp32 logits and their
shifted copy, reentrant checkpointing, PEFT's casts, and over NF4 norms, embedding and output layer in fp32, its product
in bf16; qLoRA's states are paged and lie outside the limit. Rows of full length are replayed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from engine.planner.allocator import device_events, least_limit_bytes
from engine.planner.scenario import Scenario
from engine.planner.stand_in import standing_for
from engine.planner.storages import StorageMeter
from engine.units import GIB

RANK = 64
LENGTHS = (2048, 2048)
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
# GiB without and with checkpointing.
TABLE_3 = {
    ("7b", "lora"): (40, 18),
    ("7b", "spiel-ag"): (34, 20),
    ("7b", "spiel-ma"): (30, 17),
    ("7b", "qlora"): (30, 8),
    ("7b", "qspiel-ag"): (26, 13),
    ("7b", "qspiel-ma"): (22, 10),
    ("13b", "lora"): (66, 31),
    ("13b", "spiel-ag"): (56, 36),
    ("13b", "spiel-ma"): (51, 31),
    ("13b", "qlora"): (46, 12),
    ("13b", "qspiel-ag"): (40, 19),
    ("13b", "qspiel-ma"): (35, 14),
}


@dataclass(frozen=True)
class Cell:
    """One measurement of Table 3."""

    size: str
    method: str
    checkpointing: bool

    @property
    def quantised(self) -> bool:
        """Whether the base is in NF4."""
        return self.method.startswith("q")

    @property
    def sparse(self) -> bool:
        """Whether it is SpIEL, not LoRA."""
        return "spiel" in self.method

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained numbers: fp32, over NF4 bf16 (section 5.2)."""
        return torch.bfloat16 if self.quantised else torch.float32


def cells() -> Iterator[tuple[Cell, int]]:
    """Return every cell and what the paper says, in GiB."""
    for (size, method), published in TABLE_3.items():
        for checkpointing, gib in zip((False, True), published, strict=True):
            yield Cell(size, method, checkpointing), gib


class _Base:
    """A frozen weight: dense in bf16, or NF4 with double quantisation."""

    def __init__(self, weight: Tensor, quantised: bool) -> None:
        self.shape, self.numel = weight.shape, weight.numel()
        self.dense = None if quantised else weight.detach()
        blocks = -(-self.numel // NF4_BLOCK)
        self._blocks = blocks
        self._packed = [
            _empty(self.numel // 2, torch.uint8),
            _empty(blocks, torch.uint8),
            _empty(-(-blocks // NF4_NESTED_BLOCK), torch.float32),
        ]

    @property
    def tensors(self) -> list[Tensor]:
        return self._packed if self.dense is None else [self.dense]

    def use(self) -> Tensor:
        """Return the dense weight; over NF4 a new one, made beside the scales in fp32."""
        if self.dense is not None:
            return self.dense
        scales = _empty(self._blocks, torch.float32)
        dense = torch.empty(self.shape, dtype=torch.bfloat16, device="meta")
        del scales
        return dense


def _empty(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, device="meta")


class _Frozen(torch.autograd.Function):
    """A frozen layer over NF4, whose weight is rebuilt in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: _Base) -> Tensor:
        ctx.base = base
        return functional.linear(x, base.use())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.base.use(), None


class _Sparse(torch.autograd.Function):
    """SpIEL's layer: the values are added to a copy of the weight, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: "SparseLayer") -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return functional.linear(x.to(torch.bfloat16), layer.changed()[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        weight, positions = layer.changed()
        grad = grads[0].reshape(-1, grads[0].size(-1))
        grad_x = (grad @ weight).view_as(x)
        dense = grad.t() @ x.reshape(-1, x.size(-1)).to(grad.dtype)
        return grad_x, dense.view(-1).gather(0, positions).to(layer.values.dtype), None


class SparseLayer(nn.Module):
    """A linear layer with `count` trained entries."""

    def __init__(self, base: _Base, count: int, dtype: torch.dtype) -> None:
        """Make values and indices."""
        super().__init__()
        self.base = base
        self.values = nn.Parameter(_empty(count, dtype))
        self.indices = _empty(count, torch.int32)

    def changed(self) -> tuple[Tensor, Tensor]:
        """Return the changed weight, a new tensor, and the positions in int64."""
        weight = self.base.use().clone()
        positions = self.indices.to(torch.int64)
        weight.view(-1).scatter_add_(0, positions, self.values.detach().to(weight.dtype))
        return weight, positions

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        y: Tensor = _Sparse.apply(x, self.values, self)
        return y


class LoraLayer(nn.Module):
    """A linear layer with LoRA beside it, dropout 0.1."""

    def __init__(self, base: _Base, dtype: torch.dtype) -> None:
        """Make both matrices."""
        super().__init__()
        out_features, in_features = base.shape
        self.base = base
        self.down = nn.Parameter(torch.empty(RANK, in_features, dtype=dtype, device="meta"))
        self.up = nn.Parameter(torch.empty(out_features, RANK, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        weight = self.base.dense
        y: Tensor = _Frozen.apply(x.to(torch.bfloat16), self.base) if weight is None else functional.linear(x, weight)
        low = functional.linear(functional.dropout(x.to(self.down.dtype), 0.1), self.down)
        return y.to(x.dtype) + (functional.linear(low, self.up) * 0.25).to(x.dtype)


class _OutputLayer(nn.Module):
    """An output layer in fp32 whose product is bf16: the weight is rounded anew in each forward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16))


def least_gib(cell: Cell) -> int:
    """Return the least limit, in whole GiB, at which two steps of `cell` succeed."""
    meter = StorageMeter(Scenario({0: 1}, on_cpu=False), workspaces=True)
    with standing_for(on_cpu=False):
        model, kept = _prepare(cell, meter)
        with meter:
            for length in LENGTHS:
                _micro_step(model, length)
    del kept
    return least_limit_bytes(device_events(meter.ledger), GIB) // GIB


def _prepare(cell: Cell, meter: StorageMeter) -> tuple[PreTrainedModel, list[Tensor]]:
    """Return the model, and what lies beside it all the time; the meter counts both."""
    with torch.device("meta"):
        config = LlamaConfig(**SIZES[cell.size], vocab_size=32000, use_cache=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    model.requires_grad_(False)
    kept: list[Tensor] = []
    if cell.quantised:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "embed" in name:
                parameter.data = parameter.data.float()
        model.lm_head = _OutputLayer(model.lm_head.weight.float())
    for name, module in [*model.model.named_modules()]:
        if isinstance(module, nn.Linear):
            _replace(model.model, name, module, cell, kept)
    if cell.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    for tensor in [*model.parameters(), *model.buffers(), *kept]:
        meter.adopt(tensor, "parameters")
    return model, kept


def _replace(body: nn.Module, name: str, module: nn.Linear, cell: Cell, kept: list[Tensor]) -> None:
    base = _Base(module.weight, cell.quantised)
    new: nn.Module
    if cell.sparse:
        count = RANK * sum(module.weight.shape)  # as many as LoRA trains there
        sparse = SparseLayer(base, count, cell.dtype)
        kept += _sparse_states(sparse, cell)
        new, trained = sparse, [sparse.values]
    else:
        lora = LoraLayer(base, cell.dtype)
        new, trained = lora, [lora.down, lora.up]
        if not cell.quantised:  # qLoRA's are paged: outside the limit
            kept += [_empty(each.numel(), cell.dtype) for each in trained for _ in range(2)]
    for each in trained:
        each.grad = torch.empty_like(each)
        kept.append(each.grad)
    kept += base.tensors
    parent, _, last = name.rpartition(".")
    setattr(body.get_submodule(parent), last, new)


def _sparse_states(layer: SparseLayer, cell: Cell) -> list[Tensor]:
    """Return indices and optimizer states: AG's moments, ages and candidates, MA's accumulators."""
    count = layer.values.numel()
    if cell.method.endswith("ma"):
        return [layer.indices, _empty(sum(layer.base.shape), torch.float32)]
    candidates = [_empty(count, torch.int32), *(_empty(count, torch.bfloat16) for _ in range(3))]
    return [layer.indices, *(_empty(count, torch.float32) for _ in range(3)), *candidates]


def _micro_step(model: PreTrainedModel, length: int) -> None:
    """Do the forward, the loss of the time and the backward of one row."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    call: Callable[..., Any] = model
    logits = call(input_ids=ids).logits.float()
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    loss = functional.cross_entropy(shifted, ids[..., 1:].contiguous().view(-1))
    loss.backward()
