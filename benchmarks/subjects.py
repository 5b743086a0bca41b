"""What the tables of speed and memory compare: one small Llama a method, ready to do an optimizer step.

Every subject does the same base work: forward, loss, and a backward down to the embeddings' output.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.fused_lora import add_fused_lora
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optimizers import build_optimizer
from engine.sparse.selection import select_topk_indices
from engine.spec import RunSpec

DENSITY = 0.01
SPREADS = (0.0, 0.5, 1.0, 2.0)  # 0: uniform masks


@dataclass(frozen=True)
class Size:
    """Of the model and its micro-batch. The output layer has the share that it has in a model of 32 layers."""

    device: str
    dtype: torch.dtype
    width: int
    ffn: int
    layers: int
    head: int
    tokens: int

    @property
    def vocabulary(self) -> int:
        """Words: 32,000 for 32 layers of 4,096."""
        return 1000 * self.layers * self.width // 4096

    @property
    def rank(self) -> int:
        """LoRA's rank: 64 at a width of 4,096, in proportion else."""
        return max(1, 64 * self.width // 4096)


CPU_SIZE = Size("cpu", torch.float32, 512, 1376, 8, 64, 512)
CUDA_SIZE = Size("cuda", torch.bfloat16, 4096, 11008, 4, 128, 2048)


@dataclass
class Subject:
    """A model that does steps. `share`: of the dense gradient that is computed, for sparse tuning."""

    name: str
    model: nn.Module
    step: Callable[[], None]
    share: float | None = None


class Lab:
    """Makes subjects over the same weights and the same tokens."""

    def __init__(self, size: Size) -> None:
        """Draw weights and tokens."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // size.head,
            max_position_embeddings=size.tokens,
        )
        with torch.device(size.device):
            self._base = LlamaForCausalLM(config).to(size.dtype)
            self._ids = torch.randint(0, size.vocabulary, (1, size.tokens))
        self.size = size

    @property
    def weights_bytes(self) -> int:
        """Of one copy of the model."""
        return sum(parameter.nbytes for parameter in self._base.parameters())

    def frozen(self) -> Subject:
        """Nothing is trained: forward and backward of the inputs."""
        model = self._copy()
        return Subject("frozen", model, lambda: self._backward(model))

    def sparse(self, name: str, spread: float = 1.0, *, functions: bool = True, **fields: Any) -> Subject:
        """Sparse tuning of 1 percent of all linear layers, by masks that cluster as much as `spread` says."""
        model = self._copy()
        spec = RunSpec(model="random", method="random", density=DENSITY, sequence_length=self.size.tokens, **fields)
        tuning = attach(model, spec, functions=functions)
        if spec.structure == "free":
            draw_masks(tuning, spread)
        optimizer = build_optimizer(tuning.entries, spec)

        def step() -> None:
            self._backward(model)
            tuning.end_micro_step()
            optimizer.step()
            optimizer.zero_grad()
            tuning.write_back()

        return Subject(name, model, step, tuning.gradient_share)

    def fused_lora(self) -> Subject:
        """LoRA of this project's own, as fast as plain torch allows."""
        model = self._copy()
        return self._trained(f"fused LoRA r = {self.size.rank}", model, add_fused_lora(model, self.size.rank))

    def peft(self, kind: str) -> Subject:
        """A method of the PEFT library over all linear layers: LoRA, SHiRA or Super-Tuning; dropout 0."""
        import peft

        width, ffn = self.size.width, self.size.ffn
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config: Any
        if kind == "LoRA":
            config = peft.LoraConfig(r=self.size.rank, target_modules=targets, lora_dropout=0.0)
        elif kind == "SHiRA":
            # As many values a layer as r (in + out): over all layers about as many as 1 percent.
            entries = DENSITY * (4 * width * width + 3 * width * ffn)
            rank = max(1, round(entries / (4 * 2 * width + 3 * (width + ffn))))
            config = peft.ShiraConfig(r=rank, target_modules=targets, random_seed=0)
        else:
            config = peft.SupertuningConfig(sparsity=1 - DENSITY, target_modules=targets)
        model = peft.get_peft_model(self._copy(), config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._trained(f"peft {kind}", model, trained)

    def _trained(self, name: str, model: nn.Module, trained: Iterable[nn.Parameter]) -> Subject:
        optimizer = torch.optim.AdamW(list(trained), lr=1e-4, weight_decay=0.0, fused=True)

        def step() -> None:
            self._backward(model)
            optimizer.step()
            optimizer.zero_grad()

        return Subject(name, model, step)

    def _copy(self) -> LlamaForCausalLM:
        with torch.device(self.size.device):
            model = LlamaForCausalLM(self._base.config).to(self.size.dtype)
        model.load_state_dict(self._base.state_dict())
        return model.requires_grad_(False)

    def _backward(self, model: Any) -> None:
        embedded = self._base.get_input_embeddings()(self._ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=self._ids).loss.backward()


def draw_masks(tuning: SparseTuning, spread: float) -> None:
    """Place every weight's entries where |N| exp(spread (a_i + b_j) / sqrt 2) is largest, with normal a and b."""
    generator = torch.Generator().manual_seed(0)
    for entry in tuning.entries:
        rows, columns = entry.weight.shape
        sides = torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator)
        scores = torch.randn(rows, columns, generator=generator).abs() * torch.exp(spread * sides / 2**0.5)
        entry.place(select_topk_indices(scores, entry.num_active))


def makers(lab: Lab) -> dict[str, Callable[[], Subject]]:
    """Return what makes each subject, by its name, the frozen one first; those that PEFT lacks are left out."""
    made: dict[str, Callable[[], Subject]] = {"frozen": lab.frozen}
    for spread in SPREADS:
        name = f"compaction, s = {spread:g}"
        made[name] = partial(lab.sparse, name, spread, gradient_way="compaction")
    made["auto, s = 0"] = partial(lab.sparse, "auto, s = 0", 0.0)
    made["columns"] = partial(lab.sparse, "columns", structure="columns", gradient_way="compaction")
    block = {"structure": "rows_x_columns", "gradient_way": "compaction"}
    made["rows x columns"] = partial(lab.sparse, "rows x columns", **block)
    made["sampled"] = partial(lab.sparse, "sampled", gradient_way="sampled")
    made["dense"] = partial(lab.sparse, "dense", gradient_way="dense")
    made["hook"] = partial(lab.sparse, "hook", functions=False)
    made[f"fused LoRA r = {lab.size.rank}"] = lab.fused_lora
    for kind, needed in (("LoRA", "LoraConfig"), ("SHiRA", "ShiraConfig"), ("Super-Tuning", "SupertuningConfig")):
        if importlib.util.find_spec("peft") and hasattr(importlib.import_module("peft"), needed):
            made[f"peft {kind}"] = partial(lab.peft, kind)
    return made


def versions(size: Size) -> dict[str, str]:
    """Return what the readings were taken with."""
    device = torch.cuda.get_device_name() if size.device == "cuda" else f"{platform.machine()}, 1 thread"
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["peft"] = importlib.metadata.version("peft")
    return {"device": device, "python": platform.python_version(), **found}
