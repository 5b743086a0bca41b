"""A delta is what training changes: for each weight, positions and the numbers added there.

`SparseDelta` is a delta as an object that is saved, loaded, applied and removed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import DeltaError
from engine.sparse.base_weight import NF4Weight, base_weights
from engine.sparse.entries import ActiveEntries
from engine.sparse.linear import LinearFunctions
from engine.spec import BASELINES

FORMAT_VERSION = 1
FINGERPRINT_ENTRIES = 4096  # per weight


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta belongs to and how it was made.

    `labels`: of a classification, by class number, empty for a regression; None for a causal model.
    """

    method: str
    density: float
    base_model: str
    fingerprint: str
    quantization: str = "none"
    format_version: int = FORMAT_VERSION
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SparseDelta:
    """The change of a model: parameter name to (indices, values), both (num_active,), on the CPU."""

    info: DeltaInfo
    tensors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def num_active(self) -> int:
        """Entries over all weights."""
        return sum(indices.numel() for indices, _ in self.tensors.values())

    @classmethod
    def of(cls, info: DeltaInfo, entries: Iterable[ActiveEntries]) -> "SparseDelta":
        """Return a copy of what `entries` hold now; weights without chosen entries are left out."""
        return cls(info, {entry.name: entry.change() for entry in entries if entry.is_placed})

    def apply(self, model: nn.Module) -> list[ActiveEntries]:
        """Put the delta into the weights of `model`, in place.

        Returns:
            The entries at work: `restore` on each removes the delta bit for bit, `write_back` puts it in again.

        Raises:
            DeltaError: the model is not the one that the delta was trained on.
        """
        weights = base_weights(model)
        self._check(weights)
        applied = []
        for name, (indices, values) in self.tensors.items():
            entry = ActiveEntries(name, weights[name], indices.numel())
            entry.values.requires_grad_(False)
            entry.place(indices, values)
            entry.write_back()
            applied.append(entry)
        LinearFunctions(model, [entry for entry in applied if isinstance(entry.weight, NF4Weight)])
        return applied

    def _check(self, weights: Mapping[str, nn.Parameter | NF4Weight]) -> None:
        missing = [name for name in self.tensors if name not in weights]
        if missing:
            raise DeltaError(
                f"This delta changes {missing[0]!r}, which the model does not have. "
                f"Load it over {self.info.base_model!r}."
            )
        require_base(self.info, {name: weights[name] for name in self.tensors})

    def save(self, folder: str | Path) -> None:
        """Write delta.safetensors (`<parameter>.indices`, `<parameter>.values`) and delta.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flat = {}
        for name, (indices, values) in self.tensors.items():
            flat[f"{name}.indices"], flat[f"{name}.values"] = indices, values
        save_file(flat, folder / "delta.safetensors")
        (folder / "delta.json").write_text(json.dumps(asdict(self.info), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "SparseDelta":
        """Read what `save` wrote.

        Raises:
            DeltaError: a file is missing or damaged, a newer version wrote it, or it is no sparse delta.
        """
        folder = Path(folder)
        info = read_info(folder)
        if info.method in BASELINES:
            raise DeltaError(
                f"{str(folder)!r} holds the result of {info.method}, which is no sparse delta. "
                "Choose the delta of a sparse method."
            )
        try:
            flat = load_file(folder / "delta.safetensors")
            names = sorted(key.removesuffix(".indices") for key in flat if key.endswith(".indices"))
            return cls(info, {name: (flat[f"{name}.indices"], flat[f"{name}.values"]) for name in names})
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _unreadable(folder, error) from None


def read_info(folder: Path) -> DeltaInfo:
    """Read the delta.json of the result of a run, sparse or not.

    Raises:
        DeltaError: it is missing or damaged, or a newer version wrote it.
    """
    try:
        body: dict[str, Any] = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
        version = body["format_version"]
        if version > FORMAT_VERSION:
            raise DeltaError(
                f"{str(folder)!r} has format version {version}; this program reads up to {FORMAT_VERSION}."
                " Update the program."
            )
        if body.get("labels") is not None:
            body["labels"] = tuple(body["labels"])
        return DeltaInfo(**body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> DeltaError:
    why = "there is none" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return DeltaError(
        f"{str(folder)!r} holds no delta that can be read ({why}). "
        "A run that finished or was stopped has one in its delta/ folder."
    )


def require_base(info: DeltaInfo, weights: Mapping[str, nn.Parameter | NF4Weight]) -> None:
    """Do nothing where `weights` are those that the result of a run was trained on.

    Raises:
        DeltaError: they are stored otherwise, or are others.
    """
    quantised = any(isinstance(weight, NF4Weight) for weight in weights.values())
    if quantised != (info.quantization == "nf4"):
        raise DeltaError(
            f"This delta was trained over a base with quantization={info.quantization}, and the model is "
            f"loaded with quantization={'nf4' if quantised else 'none'}. Load the model the same way."
        )
    found = fingerprint(weights)
    if found != info.fingerprint:
        raise DeltaError(
            f"The weights of this model are not those the delta was trained on (fingerprint {found[:12]}, "
            f"expected {info.fingerprint[:12]}). Load it over {info.base_model!r}."
        )


def fingerprint(weights: Mapping[str, nn.Parameter | NF4Weight]) -> str:
    """Return a hash of names, shapes and up to `FINGERPRINT_ENTRIES` evenly spaced entries of each weight.

    The entries are rounded to bf16 first, so that a model is the same in fp32 and in bf16; of an NF4 weight they are
    packed bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        stored = weight.packed if isinstance(weight, NF4Weight) else weight.detach()
        sample = stored.reshape(-1)[:: max(1, stored.numel() // FINGERPRINT_ENTRIES)]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
