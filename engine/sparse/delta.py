"""A delta is what training changes: for each weight, positions and the numbers added there.

`ActiveEntries` is a delta at work on one weight of a model; `SparseDelta` is a delta as an object that is saved,
loaded, applied and removed.
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

FORMAT_VERSION = 1
FINGERPRINT_ENTRIES = 4096  # per weight


class ActiveEntries:
    """The trained entries of one weight: where they are, what stood there, and what is added.

    `values` are fp32 (fp64 over an fp64 weight) whatever the weight is: bf16 rounds most small updates away. The weight
    holds round(base + values) at `indices` after `write_back`, and its own numbers bit for bit after `restore`.
    """

    def __init__(self, name: str, weight: nn.Parameter, num_active: int) -> None:
        """Reserve `num_active` entries of `weight`; `place` says which.

        Args:
            name: of the parameter in the model.
            weight: any shape, contiguous.
            num_active: 1 <= num_active <= weight.numel().
        """
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        self.name = name
        self.weight = weight
        self.num_active = num_active
        self.indices: Tensor | None = None  # (num_active,) sorted, unique
        self.base: Tensor | None = None  # (num_active,) the replaced entries, dtype of the weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(num_active, dtype=dtype, device=weight.device))

    def place(self, indices: Tensor) -> None:
        """Make the entries at `indices`, (num_active,), the trained ones; what stands there is kept as the base."""
        self.restore()
        self.indices = indices.to(self.weight.device)
        self.base = self._flat().index_select(0, self.indices)

    @property
    def placed(self) -> Tensor:
        """The indices, (num_active,); an error before `place`."""
        assert self.indices is not None, f"the entries of {self.name} are not placed yet"
        return self.indices

    def gather(self, dense: Tensor) -> Tensor:
        """Return the entries of `dense` (shape of the weight) at `indices`, in the dtype of the values."""
        return dense.reshape(-1).index_select(0, self.placed.to(dense.device)).to(self.values)

    @torch.no_grad()
    def write_back(self) -> None:
        """Put round(base + values) into the weight."""
        assert self.base is not None, f"the entries of {self.name} are not placed yet"
        summed = (self.base.to(self.values.dtype) + self.values).to(self.weight.dtype)
        self._flat().index_copy_(0, self.placed.long(), summed)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the replaced entries back, bit for bit. Nothing happens before `place`."""
        if self.indices is not None and self.base is not None:
            self._flat().index_copy_(0, self.indices.long(), self.base)

    def _flat(self) -> Tensor:
        return self.weight.detach().view(-1)


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta belongs to and how it was made."""

    method: str
    density: float
    base_model: str
    fingerprint: str
    format_version: int = FORMAT_VERSION


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
        return cls(
            info,
            {
                entry.name: (entry.indices.cpu().clone(), entry.values.detach().cpu().clone())
                for entry in entries
                if entry.indices is not None
            },
        )

    def apply(self, model: nn.Module) -> list[ActiveEntries]:
        """Put the delta into the weights of `model`, in place.

        Returns:
            The entries at work: `restore` on each removes the delta bit for bit, `write_back` puts it in again.

        Raises:
            DeltaError: the model is not the one that the delta was trained on.
        """
        parameters = dict(model.named_parameters())
        self._check(parameters)
        applied = []
        for name, (indices, values) in self.tensors.items():
            entry = ActiveEntries(name, parameters[name], indices.numel())
            entry.place(indices)
            entry.values.requires_grad_(False).copy_(values)
            entry.write_back()
            applied.append(entry)
        return applied

    def _check(self, parameters: Mapping[str, nn.Parameter]) -> None:
        missing = [name for name in self.tensors if name not in parameters]
        if missing:
            raise DeltaError(f"This delta changes {missing[0]!r}, which the model does not have. {self._remedy()}")
        found = fingerprint({name: parameters[name] for name in self.tensors})
        if found != self.info.fingerprint:
            raise DeltaError(
                f"The weights of this model are not those the delta was trained on (fingerprint {found[:12]}, "
                f"expected {self.info.fingerprint[:12]}). {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"Load it over {self.info.base_model!r}."

    def save(self, folder: Path) -> None:
        """Write delta.safetensors (`<parameter>.indices`, `<parameter>.values`) and delta.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        flat = {}
        for name, (indices, values) in self.tensors.items():
            flat[f"{name}.indices"], flat[f"{name}.values"] = indices, values
        save_file(flat, folder / "delta.safetensors")
        (folder / "delta.json").write_text(json.dumps(asdict(self.info), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SparseDelta":
        """Read what `save` wrote.

        Raises:
            DeltaError: a file is missing or damaged, or a newer version wrote it.
        """
        try:
            body: dict[str, Any] = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
            flat = load_file(folder / "delta.safetensors")
            version = body["format_version"]
            if version > FORMAT_VERSION:
                raise DeltaError(
                    f"{str(folder)!r} has format version {version}; this program reads up to {FORMAT_VERSION}."
                    " Update the program."
                )
            names = sorted(key.removesuffix(".indices") for key in flat if key.endswith(".indices"))
            tensors = {name: (flat[f"{name}.indices"], flat[f"{name}.values"]) for name in names}
            return cls(DeltaInfo(**body), tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DeltaError(
                f"{str(folder)!r} holds no delta that can be read ({type(error).__name__}: {error}). "
                "A run that finished or was stopped has one in its delta/ folder."
            ) from None


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and up to `FINGERPRINT_ENTRIES` evenly spaced entries of each weight.

    The entries are rounded to bf16 first, so that a model is the same in fp32 and in bf16.
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        weight = parameters[name].detach()
        step = max(1, weight.numel() // FINGERPRINT_ENTRIES)
        sample = weight.reshape(-1)[::step].to(torch.bfloat16).contiguous().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
