"""Deltas over one base as vectors: scaled, added, compared.

SpIEL composes tasks by adding their sparse deltas (arXiv:2401.16405, section 5.1): the union of the positions, values
that share one summed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from engine.errors import DeltaError
from engine.sparse.delta import SparseDelta

Entries = tuple[Tensor, Tensor]  # indices, sorted and unique, and values, (num_active,) each


def scale(delta: SparseDelta, factor: float) -> SparseDelta:
    """Return `factor` times the delta, at the same positions.

    Args:
        delta: any delta; it is not changed.
        factor: 1 is the delta itself, -1 its negative, 0.5 half of the change.

    Raises:
        DeltaError: `factor` is not a finite number, or so large that a value overflows fp32.
    """
    if not math.isfinite(factor):
        raise DeltaError(f"The factor of a delta must be a finite number, got {factor}. 1 leaves the delta as it is.")
    tensors = {name: (at, values * factor) for name, (at, values) in delta.tensors.items()}
    if not all(values.isfinite().all() for _, values in tensors.values()):
        raise DeltaError(
            f"Times {factor:g} the delta's values overflow fp32. Give a smaller factor; 1 is the delta itself."
        )
    return replace(delta, tensors=tensors)


def add(deltas: Sequence[SparseDelta]) -> SparseDelta:
    """Return the sum of deltas: all their positions, sorted and unique, and the sums of their values.

    Values of the same position are summed in the order of `deltas`, in their own precision.

    Args:
        deltas: one or more, trained over the same weights of the same base.

    Returns:
        A delta whose method names every method (`sift+spiel-ag`) and whose density is that of the union.

    Raises:
        DeltaError: there is none, or they belong to different weights.
    """
    if not deltas:
        raise DeltaError("A sum needs one delta or more, got none.")
    first = deltas[0]
    for other in deltas[1:]:
        _require_same_base(first, other)
    names = dict.fromkeys(name for delta in deltas for name in delta.tensors)
    tensors = {name: sum_entries([delta.tensors[name] for delta in deltas if name in delta.tensors]) for name in names}
    method = "+".join(dict.fromkeys(part for delta in deltas for part in delta.info.method.split("+")))
    summed = SparseDelta(replace(first.info, method=method), tensors)
    density = first.info.density * summed.num_active / max(1, first.num_active)  # of the same target weights
    return replace(summed, info=replace(summed.info, density=density))


def sum_entries(parts: Sequence[Entries]) -> Entries:
    """Return the entries of one weight with sorted, unique indices; values of the same position are summed."""
    indices, places = torch.cat([at for at, _ in parts]).unique(sorted=True, return_inverse=True)
    values = torch.cat([values for _, values in parts])
    return indices, values.new_zeros(indices.numel()).index_add_(0, places, values)


@dataclass(frozen=True)
class Overlap:
    """How far two deltas change the same entries in the same direction, in one weight or over all."""

    first_active: int
    """Entries of the first delta."""
    second_active: int
    """Entries of the second delta."""
    shared: int
    """Positions that both change."""
    agreeing: int
    """Shared positions whose two values have the same sign."""
    dot: float
    """Sum over shared positions of the product of the two values."""
    first_square: float
    """Sum over shared positions of the first delta's squared values."""
    second_square: float
    """Sum over shared positions of the second delta's squared values."""

    @property
    def jaccard(self) -> float:
        """Shared positions over all positions of either, 0 to 1; 0 where there are none."""
        return self.shared / max(1, self.first_active + self.second_active - self.shared)

    @property
    def same_sign(self) -> float | None:
        """Share of the shared positions whose values have the same sign, 0 to 1; None where none is shared."""
        return self.agreeing / self.shared if self.shared else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the values at shared positions, -1 to 1; None where none is shared or all are zero."""
        length = math.sqrt(self.first_square) * math.sqrt(self.second_square)
        return self.dot / length if length else None


def overlap(first: SparseDelta, second: SparseDelta) -> tuple[Overlap, dict[str, Overlap]]:
    """Compare the positions and the values of two deltas.

    Returns:
        The overlap over all weights, and by the name of the weight.

    Raises:
        DeltaError: they belong to different weights.
    """
    _require_same_base(first, second)
    none: Entries = (torch.empty(0, dtype=torch.int32), torch.empty(0))
    names = dict.fromkeys((*first.tensors, *second.tensors))
    each = {name: _compare(first.tensors.get(name, none), second.tensors.get(name, none)) for name in names}
    return Overlap(*(sum(getattr(part, field.name) for part in each.values()) for field in fields(Overlap))), each


def _compare(first: Entries, second: Entries) -> Overlap:
    (first_at, first_values), (second_at, second_values) = first, second
    in_first, in_second = torch.isin(first_at, second_at), torch.isin(second_at, first_at)
    left, right = first_values[in_first].double(), second_values[in_second].double()  # both sorted by position
    return Overlap(
        first_at.numel(),
        second_at.numel(),
        left.numel(),
        int((left.sign() == right.sign()).sum()),
        float(left @ right),
        float(left @ left),
        float(right @ right),
    )


def _require_same_base(first: SparseDelta, second: SparseDelta) -> None:
    one, other = first.info, second.info
    if one.quantization != other.quantization:
        raise DeltaError(
            f"Deltas over quantization={one.quantization} and quantization={other.quantization} belong to different "
            "weights. Train both over the same."
        )
    if one.fingerprint != other.fingerprint:
        raise DeltaError(
            f"These deltas do not change the same weights of the same base ({one.base_model!r} with fingerprint "
            f"{one.fingerprint[:12]}, {other.base_model!r} with fingerprint {other.fingerprint[:12]}). "
            "Train both with the same model and targets."
        )
