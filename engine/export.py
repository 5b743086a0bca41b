"""The result of a run in formats that other tools load: a merged model, or a PEFT adapter of type SUPERTUNING.

Safetensors only. Every folder gets a model card.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.errors import DeltaError, EngineError
from engine.events import ModelLoaded
from engine.hardware import resolve_device
from engine.metrics import WORDS
from engine.models import device_of, load_model, load_tokenizer, resolve_dtype
from engine.peft_format import MERGE_INSTEAD, PEFT_CONFIG, PEFT_WEIGHTS, peft_config, peft_tensors, require_own_names
from engine.planner.shape import resolve_model
from engine.runs import Run, read_events, read_report, read_spec, require_idle, write_json
from engine.sparse.base_weight import NF4Weight, base_weights
from engine.sparse.delta import DeltaInfo, SparseDelta, read_info, require_base
from engine.sparse.entries import ActiveEntries
from engine.sparse.linear import rebuild_weight
from engine.spec import BASELINES, RunSpec
from engine.train.head import apply_head, read_head
from engine.train.results import load_base, merge_result
from engine.units import format_percent

Kind = Literal["merged", "peft"]
USE = {
    "merged": "A whole model: `AutoModelForCausalLM.from_pretrained` loads this folder.\n",
    "peft": "A PEFT adapter (peft 0.21.2 or later): load {base} with `AutoModelForCausalLM.from_pretrained`, then this "
    "folder with `PeftModel.from_pretrained(model, folder)`.\n",
}
IA3_IN_4_BIT = (
    "Over a base in 4 bit call the model within `torch.autocast(device, torch.{dtype})`: PEFT's IA3 layers return "
    "float32 there otherwise, which attention does not take.\n"
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    kind: Kind
    folder: Path
    num_bytes: int
    """Of all files."""
    dtype: str
    """Of the model: float32, bfloat16 or float16."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Measured on the way; see `merge` and `export_peft`."""


def export(run: Run, folder: Path, kind: Kind) -> Exported:
    """Write the result of `run` into `folder` as `kind`; see `merge` and `export_peft`.

    Raises:
        EngineError: as these say, or a run is at work on the GPU that an NF4 base was quantised on.
    """
    if kind == "peft":
        return export_peft(run, folder)
    spec = read_spec(run)
    require_idle(resolve_device(spec.device if spec.quantization == "nf4" else "cpu"), run.path.parent)
    return merge(run, folder)


def merge(run: Run, folder: Path) -> Exported:
    """Write base + result as a dense model with its tokenizer, in the dtype that the run computed in.

    An NF4 base is dequantised first. What its users lose who quantise the merged model again is then in `figures`:
    `requantised_error_max` and `requantised_error_rms`, over all entries of the NF4 weights, and for a sparse delta
    `delta_rms`, the delta over the same entries, to compare with.

    Args:
        run: with a result: a delta, an adapter, or all weights.
        folder: new or empty.

    Raises:
        EngineError: the folder is not empty or cannot be written; the result or the model cannot be loaded.
    """
    folder = _require_free(folder)
    info = read_info(run.delta_path)
    delta = None if info.method in BASELINES else SparseDelta.load(run.delta_path)
    spec = spec_as_run(run)
    quantised = spec.quantization == "nf4"  # the base, be it that no weight of the delta is
    device = device_of(spec.device if quantised else "cpu")
    model, head = load_base(spec, device, info.labels), read_head(run.delta_path)
    if delta is None:
        require_base(info, {name: weight for name, weight in base_weights(model).items() if name not in head})
    entries = [] if delta is None else delta.apply(model)
    if quantised:
        model = _dense(spec, model, entries, info.labels)
    if delta is None:
        model = merge_result(model, run.delta_path)
    apply_head(model, head)
    tokenizer = load_tokenizer(spec)
    figures: dict[str, float] = {}
    with _filling(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if quantised:
            figures = _requantised_error(spec, partial, model, info, delta)
        card = _model_card("merged", spec, info, read_report(run), figures)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported("merged", folder, _size(folder), spec.dtype, figures)


def spec_as_run(run: Run) -> RunSpec:
    """Return the spec with `auto` resolved to the dtype that the run computed in, wherever that was."""
    spec = read_spec(run)
    loaded = [record.event.dtype for record in read_events(run)[0] if isinstance(record.event, ModelLoaded)]
    if not loaded:
        dtype = resolve_dtype(spec.dtype, torch.device(resolve_device(spec.device).name))
        loaded = [str(dtype).removeprefix("torch.")]
    return spec.model_copy(update={"dtype": loaded[-1]})


@torch.no_grad()
def _dense(
    spec: RunSpec, model: PreTrainedModel, entries: list[ActiveEntries], labels: tuple[str, ...] | None
) -> PreTrainedModel:
    """Return the dense model, on the CPU, that computes what an NF4 model with applied `entries` computes."""
    weights, applied = base_weights(model), {entry.name: entry for entry in entries}
    dense = load_base(spec.model_copy(update={"quantization": "none"}), torch.device("cpu"), labels)
    for name, parameter in dense.named_parameters():
        weight = weights[name]
        held = _as_quantised(dense, name) if isinstance(weight, NF4Weight) else parameter
        if name in applied:
            held.copy_(rebuild_weight(applied[name], parameter.dtype))
        else:
            held.copy_(weight.dense() if isinstance(weight, NF4Weight) else weight)
    return dense


def _as_quantised(model: PreTrainedModel, name: str) -> Tensor:
    """Return a weight of a dense model laid out as NF4 holds it, (out, in): layers of GPT-2 have it (in, out)."""
    weight = model.get_parameter(name).detach()
    return weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight


def _requantised_error(
    spec: RunSpec, folder: Path, merged: PreTrainedModel, info: DeltaInfo, delta: SparseDelta | None
) -> dict[str, float]:
    """Load the merged model in NF4, as its users would, and compare it with itself."""
    device = device_of(spec.device)
    again = load_base(spec.model_copy(update={"model": str(folder), "model_revision": None}), device, info.labels)
    largest = squares = delta_squares = 0.0
    count = 0
    for name, weight in base_weights(again).items():
        if isinstance(weight, NF4Weight):
            error = weight.dense().float() - _as_quantised(merged, name).to(device).float()
            largest = max(largest, error.abs().max().item())
            squares += error.square().sum(dtype=torch.float64).item()
            count += error.numel()
            if delta is not None and name in delta.tensors:
                delta_squares += delta.tensors[name][1].square().sum(dtype=torch.float64).item()
    figures = {"requantised_error_max": largest, "requantised_error_rms": math.sqrt(squares / count)}
    return figures if delta is None else {**figures, "delta_rms": math.sqrt(delta_squares / count)}


def export_peft(run: Run, folder: Path) -> Exported:
    """Write the result as a PEFT adapter, which `PeftModel.from_pretrained` loads over the base.

    The adapter of lora or ia3 is what PEFT saved. Of a sparse delta PEFT rounds each value to the dtype of the base
    before it adds it, while a run rounds the sum once: `figures` has `share_rounded_otherwise`, the share of the
    trained entries that differ for that, 0 to 1; 0 in float32.

    Args:
        run: of lora or ia3, or with a delta over a dense base, of linear layers only.
        folder: new or empty.

    Raises:
        DeltaError: PEFT has no place for this result; the sentence offers the merge.
        EngineError: the folder is not empty or cannot be written; the delta or the model cannot be loaded.
    """
    folder = _require_free(folder)
    info = read_info(run.delta_path)
    if info.labels is not None:
        raise DeltaError(
            f"A PEFT adapter has no place for the head of a classification, which is trained dense. {MERGE_INSTEAD}"
        )
    require_own_names(read_spec(run))
    if info.method in BASELINES:
        return _copy_adapter(run, info, folder)
    delta = SparseDelta.load(run.delta_path)
    if delta.info.quantization == "nf4":
        raise DeltaError(
            "A PEFT adapter of sparse values needs a dense base, and this run has quantization=nf4: PEFT would size "
            f"the adapter by the packed weights. {MERGE_INSTEAD}"
        )
    spec = spec_as_run(run)
    model = load_model(spec, torch.device("cpu"))
    figures = {"share_rounded_otherwise": _rounded_otherwise(delta.apply(model))}
    tensors, sparsity = peft_tensors(delta, model)
    with _filling(folder) as partial:
        save_file(tensors, partial / PEFT_WEIGHTS, metadata={"format": "pt"})
        write_json(partial / PEFT_CONFIG, peft_config(spec, delta, sparsity))
        write_json(partial / "delta.json", asdict(delta.info))
        card = _model_card("peft", spec, info, read_report(run), figures)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported("peft", folder, _size(folder), spec.dtype, figures)


def _copy_adapter(run: Run, info: DeltaInfo, folder: Path) -> Exported:
    """Write the adapter as PEFT saved it, with the base that its users load."""
    if info.method == "full":
        raise DeltaError(f"The result of full is whole weights, not an adapter. {MERGE_INSTEAD}")
    spec = spec_as_run(run)
    with _filling(folder) as partial:
        for name in (PEFT_WEIGHTS, "delta.json"):
            shutil.copyfile(run.delta_path / name, partial / name)
        config = json.loads((run.delta_path / PEFT_CONFIG).read_text(encoding="utf-8"))
        base = str(resolve_model(spec.model, spec.model_revision))
        write_json(partial / PEFT_CONFIG, {**config, "base_model_name_or_path": base, "revision": spec.model_revision})
        card = _model_card("peft", spec, info, read_report(run), {})
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported("peft", folder, _size(folder), spec.dtype)


def _rounded_otherwise(entries: list[ActiveEntries]) -> float:
    differing = 0
    for entry in entries:
        assert isinstance(entry.weight, nn.Parameter)
        assert entry.base is not None
        ours = entry.weight.detach().view(-1).index_select(0, entry.placed)
        differing += int((entry.base + entry.values.to(entry.base.dtype) != ours).sum())
    return differing / max(1, sum(entry.num_active for entry in entries))


def _model_card(
    kind: Kind, spec: RunSpec, info: DeltaInfo, report: Mapping[str, Any], figures: Mapping[str, float]
) -> str:
    """Return README.md: what it is, what it was made from, what it reached on rows held out."""
    base, dataset = (
        Path(name).name if Path(name).is_absolute() else name for name in (spec.model, spec.dataset or "unknown")
    )
    header: dict[str, Any] = {"library_name": "transformers" if kind == "merged" else "peft", "tags": [spec.method]}
    if not isinstance(resolve_model(spec.model, spec.model_revision), Path):
        header["base_model"] = base
    facts = {
        "Base model": base + (f", revision {spec.model_revision}" if spec.model_revision else ""),
        "Base weights": f"{spec.dtype}, quantization {spec.quantization}",
        "Method": info.method,
        "Density": f"{format_percent(info.density)} of the entries of the target weights",
        "Dataset": dataset,
        "Steps": report.get("steps", "not reported"),
        f"Held-out loss per {'row' if info.labels is not None else 'token'}": _figures(report, "evaluation_loss"),
        **_scores(report, info),
        **{name.replace("_", " ").capitalize(): f"{figure:.3g}" for name, figure in figures.items()},
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    title = f"# {base} tuned by {info.method} on {dataset}"
    use = _use(kind, spec).format(base=base, dtype=spec.dtype)
    return f"---\n{yaml.safe_dump(header)}---\n\n{title}\n\n{use}\n| | |\n|---|---|\n{rows}"


def _use(kind: Kind, spec: RunSpec) -> str:
    use = USE[kind].replace("CausalLM", "SequenceClassification") if spec.task == "classification" else USE[kind]
    in_16_bit = spec.quantization == "nf4" and spec.dtype != "float32"
    return use + IA3_IN_4_BIT if kind == "peft" and spec.method == "ia3" and in_16_bit else use


def _figures(report: Mapping[str, Any], name: str) -> str:
    sides = {side: (report.get(name) or {}).get(side) for side in ("base", "tuned")}
    return ", ".join(f"{side} {'not measured' if each is None else f'{each:.3f}'}" for side, each in sides.items())


def _scores(report: Mapping[str, Any], info: DeltaInfo) -> dict[str, str]:
    if info.labels is None:
        return {"Held-out exact match": _figures(report, "exact_match")}
    tuned = (report.get("metrics") or {}).get("tuned", {})
    return {f"Held-out {WORDS.get(name, name)}": f"{figure:.3f}" for name, figure in tuned.items()}


def _require_free(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise EngineError(f"{str(folder)!r} cannot be read: {error.strerror}. Name another folder.") from None
    if taken:
        raise EngineError(
            f"An export goes into a new or an empty folder, and {str(folder)!r} is neither. Name another."
        )
    return folder


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """Yield a folder inside `folder` whose files move up once all are written; nothing stays of a failure."""
    partial = folder / ".partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in list(partial.iterdir()):
            path.rename(folder / path.name)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise EngineError(f"{str(folder)!r} cannot be written: {why}. Name another folder.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
