"""A delta as a PEFT adapter of type SUPERTUNING (peft 0.21.2), and back.

PEFT keeps, for each nn.Linear, flat int32 positions and fp32 values of one length that a single `sparsity` gives for
all; shorter ones are filled up with their last position and the value 0, which is exact because PEFT adds values.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import DeltaError
from engine.models import also_sees
from engine.planner.shape import resolve_model
from engine.sparse.base_weight import NF4Weight, base_weights
from engine.sparse.compose import sum_entries
from engine.sparse.delta import DeltaInfo, SparseDelta, fingerprint, read_info, require_base
from engine.spec import RunSpec

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE_INSTEAD = "Export it merged instead (--as merged)."


def require_own_names(spec: RunSpec) -> None:
    """Do nothing where the run's names are those of the model that users of an adapter load.

    Raises:
        DeltaError: the base also sees, so that they are not; the sentence offers the merge.
    """
    if also_sees(spec):
        raise DeltaError(
            f"A PEFT adapter names the layers of the model that its users load, and {spec.model!r} also sees: the run "
            f"trained its language model alone, whose layers have other names. {MERGE_INSTEAD}"
        )


def peft_config(spec: RunSpec, delta: SparseDelta, sparsity: float) -> dict[str, Any]:
    """Return adapter_config.json of a delta over the base of `spec`."""
    return {
        "peft_type": "SUPERTUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(resolve_model(spec.model, spec.model_revision)),
        "revision": spec.model_revision,
        "inference_mode": True,
        "save_precomputed_indices": True,
        "sparsity": sparsity,
        "target_modules": [name.removesuffix(".weight") for name in delta.tensors],
    }


def peft_tensors(delta: SparseDelta, model: nn.Module) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of the adapter file, and the one sparsity from which PEFT derives all their lengths.

    Raises:
        DeltaError: the delta changes something that PEFT has no place for; the sentence offers the merge.
    """
    numels = {name: _linear_numel(name, model) for name in delta.tensors}
    counts = {name: indices.numel() for name, (indices, _) in delta.tensors.items()}
    sparsity = 1 - max(count / numels[name] for name, count in counts.items())
    while any(_peft_count(numels[name], sparsity) < count for name, count in counts.items()):
        sparsity = math.nextafter(sparsity, 0)
    tensors = {}
    for name, (indices, values) in delta.tensors.items():
        missing = _peft_count(numels[name], sparsity) - indices.numel()
        module = PEFT_PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.supertuning_indices"] = torch.cat([indices, indices[-1:].expand(missing)])
        tensors[f"{module}.supertuning_values"] = torch.cat([values.float(), torch.zeros(missing)])
    return tensors, sparsity


def _peft_count(numel: int, sparsity: float) -> int:
    return int(numel * (1 - sparsity))  # peft 0.21.2, tuners/supertuning/layer.py, _num_trainable


def _linear_numel(name: str, model: nn.Module) -> int:
    module = model.get_submodule(name.rpartition(".")[0])
    if not (isinstance(module, nn.Linear) and name.endswith(".weight")):
        raise DeltaError(
            f"A PEFT adapter of sparse values reaches weights of nn.Linear layers only, and this delta changes {name!r}"
            f" of a {type(module).__name__}. {MERGE_INSTEAD}"
        )
    if module.weight.numel() > torch.iinfo(torch.int32).max:
        raise DeltaError(
            f"A PEFT adapter of sparse values has 32-bit positions, and {name!r} has {module.weight.numel():,} "
            f"entries. {MERGE_INSTEAD}"
        )
    return module.weight.numel()


def import_peft(folder: Path, model: nn.Module) -> SparseDelta:
    """Return the delta in a PEFT adapter folder of type SUPERTUNING, written by `export_peft` or by PEFT itself.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the dense base; it is not changed.

    Raises:
        DeltaError: the folder holds no such adapter, or one for another base.
    """
    try:
        config: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        flat = load_file(folder / PEFT_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DeltaError(f"{str(folder)!r} holds no PEFT adapter that can be read ({error}).") from None
    if config.get("peft_type") != "SUPERTUNING" or config.get("r"):
        kind = f"{config.get('peft_type')}" + (" with a low-rank part" if config.get("r") else "")
        raise DeltaError(f"Only PEFT adapters of type SUPERTUNING without a low-rank part are deltas, got {kind}.")
    weights = base_weights(model)
    modules = dict.fromkeys(key.rpartition(".")[0] for key in flat)
    tensors = {f"{module.removeprefix(PEFT_PREFIX)}.weight": _entries_of(module, flat, weights) for module in modules}
    used = {name: weights[name] for name in tensors}
    if (folder / "delta.json").is_file():
        info = read_info(folder)
        require_base(info, used)
    else:  # PEFT chooses by magnitude
        active = sum(indices.numel() for indices, _ in tensors.values())
        density = active / max(1, sum(weight.numel() for weight in used.values()))
        info = DeltaInfo("magnitude", density, config.get("base_model_name_or_path") or "", fingerprint(used))
    return SparseDelta(info, tensors)


def _entries_of(
    module: str, flat: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter | NF4Weight]
) -> tuple[Tensor, Tensor]:
    keys = f"{module}.supertuning_indices", f"{module}.supertuning_values"
    weight = weights.get(f"{module.removeprefix(PEFT_PREFIX)}.weight")
    if not all(key in flat for key in keys) or flat[keys[0]].shape != flat[keys[1]].shape:
        raise DeltaError(f"The adapter has no sparse values with their indices for {module!r}; nothing was read.")
    indices, values = (flat[key] for key in keys)
    if not isinstance(weight, nn.Parameter) or bool(((indices < 0) | (indices >= weight.numel())).any()):
        raise DeltaError(f"The adapter changes {module!r}, and this model has no dense weight of that name and size.")
    return sum_entries([(indices, values.float())])
