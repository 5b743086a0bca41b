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
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.fused_lora import add_fused_lora
from benchmarks.random_models import random_model, weights_bytes
from engine.chunked_loss import OutputLayer, output_layer, summed_loss
from engine.models import describe_model
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.selection import select_topk_indices
from engine.spec import RunSpec

DENSITY = 0.01
# What every sparse subject is made with, where its maker says nothing else.
SPARSE: dict[str, Any] = {"method": "random", "density": DENSITY, "recompute": "elementwise"}
SPREADS = (0.0, 0.5, 1.0, 2.0)  # 0: uniform masks
ATTENTION = "SIFT 5 % on q, k, v, o"
KEPT = "no recomputation"


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
LLAMA_7B = Size("cuda", torch.bfloat16, 4096, 11008, 32, 128, 2048)


@dataclass
class Subject:
    """A model that does steps. `share`: of the dense gradient that is computed, for sparse tuning.

    `dtype`: of the base and of what is trained, in words.
    """

    name: str
    model: nn.Module
    step: Callable[[], None]
    dtype: str
    share: float | None = None


Make = Callable[[], Subject]


class Lab:
    """Makes subjects over the same weights and the same tokens; it holds no weights itself."""

    def __init__(self, size: Size) -> None:
        """Draw tokens, and write down the model's config."""
        self.size = size
        self._device = torch.device(size.device)
        self._folder = TemporaryDirectory()
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // size.head,
            max_position_embeddings=size.tokens,
        ).save_pretrained(self._folder.name)
        ids = torch.randint(0, size.vocabulary, (1, size.tokens), generator=torch.Generator().manual_seed(0))
        self._ids = ids.to(self._device)
        self.weights_bytes = weights_bytes(describe_model(self.spec(), self._device))
        """Of one dense copy of the model."""

    def spec(self, **fields: Any) -> RunSpec:
        """Return what is asked of a subject: `SPARSE`, and `fields`. All subjects are made of such a spec."""
        run = {"model": self._folder.name, "dtype": _words(self.size.dtype), "sequence_length": self.size.tokens}
        return RunSpec(**{**run, "gradient_accumulation": 1, **SPARSE, **fields})

    def frozen(self) -> Subject:
        """Nothing is trained: forward and backward of the inputs."""
        model = self._model(self.spec())
        return Subject("frozen", model, lambda: self._backward(model), _words(self.size.dtype))

    def sparse(self, name: str, spread: float = 1.0, *, functions: bool = True, **fields: Any) -> Subject:
        """Sparse tuning by masks that cluster as much as `spread` says; 1 percent of all linear layers by default.

        A step between two reselections, where the method has these.
        """
        spec = self.spec(**fields)
        model = self._model(spec)
        tuning = attach(model, spec, functions=functions)
        if spec.structure == "free":
            draw_masks(tuning, spread)
        optimizer = tuning.make_optimizer()
        chunks = output_layer(model) if spec.chunked_loss else None

        def step() -> None:
            self._backward(model, chunks)
            tuning.end_micro_step()
            optimizer.step()
            optimizer.zero_grad()
            tuning.write_back()

        base = "nf4" if spec.quantization == "nf4" else _words(self.size.dtype)
        return Subject(name, model, step, f"{base}, values float32", tuning.gradient_share)

    def fused_lora(self, name: str, **fields: Any) -> Subject:
        """LoRA of this project's own, as fast as plain torch allows, in the dtype of the base."""
        model = self._model(self.spec(**fields))
        return self._trained(name, model, add_fused_lora(model, self.size.rank))

    def peft(self, name: str, kind: str, *, wide: bool = True, **fields: Any) -> Subject:
        """A method of the PEFT library over all linear layers: LoRA, SHiRA or Super-Tuning; dropout 0.

        Args:
            name: of the subject.
            kind: of the three.
            wide: whether adapters are fp32, as PEFT makes them over a 16-bit base, or of the base's dtype.
            fields: of the spec.
        """
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
        model = peft.get_peft_model(self._model(self.spec(**fields)), config, autocast_adapter_dtype=wide)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._trained(name, model, trained)

    def _trained(self, name: str, model: nn.Module, trained: Iterable[nn.Parameter]) -> Subject:
        parameters = list(trained)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

        def step() -> None:
            self._backward(model)
            optimizer.step()
            optimizer.zero_grad()

        return Subject(name, model, step, f"{_words(self.size.dtype)}, adapters {_words(parameters[0].dtype)}")

    def _model(self, spec: RunSpec) -> PreTrainedModel:
        model = random_model(spec, self._device)
        model.requires_grad_(False)
        model.config.use_cache = False
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        return model

    def _backward(self, model: Any, chunks: OutputLayer | None = None) -> None:
        embedded = model.get_input_embeddings()(self._ids).detach().requires_grad_()
        if chunks is None:
            model(inputs_embeds=embedded, labels=self._ids).loss.backward()
        else:
            chunked_loss(model.model(inputs_embeds=embedded).last_hidden_state, self._ids, chunks).backward()


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def chunked_loss(hidden: Tensor, ids: Tensor, layer: OutputLayer) -> Tensor:
    """Return the mean loss of the next tokens as runs have it. hidden: (1, tokens, width), ids: (1, tokens)."""
    return summed_loss(layer, hidden[0, :-1], ids[0, 1:]) / (ids.numel() - 1)


def draw_masks(tuning: SparseTuning, spread: float) -> None:
    """Place every weight's entries where |N| exp(spread (a_i + b_j) / sqrt 2) is largest, with normal a and b."""
    generator = torch.Generator(tuning.entries[0].weight.device).manual_seed(0)
    for entry in tuning.entries:
        rows, columns = entry.weight.shape
        entry.place(clustered_mask((rows, columns), entry.num_active, spread, generator))


def clustered_mask(shape: tuple[int, int], count: int, spread: float, generator: torch.Generator) -> Tensor:
    """Return where |N| exp(spread (a_i + b_j) / sqrt 2) is largest, (count,) flat positions, normal a and b."""
    rows, columns = shape
    draw = partial(torch.randn, generator=generator, device=generator.device)
    sides = draw(rows, 1) + draw(1, columns)
    return select_topk_indices(draw(rows, columns).abs_().mul_(torch.exp(spread * sides / 2**0.5)), count)


def makers(lab: Lab) -> dict[str, Make]:
    """Return what makes each subject, by its name, the frozen one first; those that PEFT lacks are left out."""
    made: dict[str, Make] = {"frozen": lab.frozen}

    def add(name: str, make: Callable[..., Subject], *arguments: Any, **fields: Any) -> None:
        made[name] = partial(make, name, *arguments, **fields)

    for spread in SPREADS:
        add(f"compaction, s = {spread:g}", lab.sparse, spread, gradient_way="compaction")
    add("auto, s = 0", lab.sparse, 0.0)
    add("columns", lab.sparse, structure="columns", gradient_way="compaction")
    add("rows x columns", lab.sparse, structure="rows_x_columns", gradient_way="compaction")
    add("sampled", lab.sparse, gradient_way="sampled")
    add("dense", lab.sparse, gradient_way="dense")
    add("hook", lab.sparse, functions=False)
    add(ATTENTION, lab.sparse, targets="attention", density=0.05)
    add(f"fused LoRA r = {lab.size.rank}", lab.fused_lora)
    if has_peft("LoraConfig"):
        add("peft LoRA", lab.peft, "LoRA")
    if has_peft("LoraConfig") and lab.size.dtype != torch.float32:
        add("peft LoRA, narrow adapters", lab.peft, "LoRA", wide=False)
    for kind, needed in (("SHiRA", "ShiraConfig"), ("Super-Tuning", "SupertuningConfig")):
        if has_peft(needed):
            add(f"peft {kind}", lab.peft, kind)
    return made


def quantised_makers(lab: Lab) -> dict[str, Make]:
    """Return what makes SpIEL over NF4 (qSpIEL) and over the dense base, both with checkpointing."""
    fields: dict[str, Any] = {"method": "spiel-ag", "gradient_checkpointing": True}
    names = {"none": dense_checkpointed(lab.size), "nf4": "qSpIEL, checkpointed"}
    return {name: partial(lab.sparse, name, quantization=base, **fields) for base, name in names.items()}


def dense_checkpointed(size: Size) -> str:
    """Return the name of SpIEL over a dense base, with checkpointing."""
    return f"SpIEL over {_words(size.dtype)}, checkpointed"


def recomputation_makers(lab: Lab) -> dict[str, Make]:
    """Return what makes LoRA that recomputes its activations, and sparse tuning that keeps them."""
    lora: dict[str, Callable[..., Subject]] = {f"fused LoRA r = {lab.size.rank}, checkpointed": lab.fused_lora}
    if has_peft("LoraConfig"):
        lora["peft LoRA, checkpointed"] = partial(lab.peft, kind="LoRA")
    made: dict[str, Make] = {name: partial(make, name, gradient_checkpointing=True) for name, make in lora.items()}
    return made | {KEPT: partial(lab.sparse, KEPT, chunked_loss=True)}


def has_peft(name: str) -> bool:
    """Return whether the PEFT library is here and has this config."""
    return importlib.util.find_spec("peft") is not None and hasattr(importlib.import_module("peft"), name)


def versions(device_type: str) -> dict[str, str]:
    """Return what the readings were taken with."""
    device, optional = f"{platform.machine()}, 1 thread", ["peft", "bitsandbytes"]
    if device_type == "cuda":
        device, optional = torch.cuda.get_device_name(), [*optional, "triton", "liger-kernel"]
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for name in optional:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"device": device, "python": platform.python_version(), **found}
