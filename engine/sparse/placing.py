"""Entries chosen without gradients: at random, or by the size of the weights."""

from collections.abc import Sequence

import torch

from engine.sparse.base_weight import NF4Weight
from engine.sparse.entries import ActiveEntries
from engine.sparse.selection import GlobalChoice, index_dtype, largest_places, select_random_indices


def place_random(entries: Sequence[ActiveEntries], generator: torch.Generator) -> None:
    """Choose the entries at random: the control of both papers."""
    for entry in entries:
        entry.place(select_random_indices(entry.weight.numel(), entry.num_active, generator))


def place_by_magnitude(entries: Sequence[ActiveEntries], *, largest: bool, together: bool) -> None:
    """Choose the entries of largest or smallest |weight|, which needs no data; `together`: one budget over all."""
    choice = GlobalChoice(sum(entry.num_active for entry in entries)) if together else None
    for entry in entries:
        weight = entry.weight
        magnitude = (weight.dense() if isinstance(weight, NF4Weight) else weight.detach()).abs().flatten()
        if choice is not None:
            choice.add(entry.name, magnitude if largest else -magnitude, magnitude)
            continue
        top = largest_places(magnitude if largest else -magnitude, entry.num_active)
        entry.place(top.sort().values.to(index_dtype(magnitude.numel())))
    if choice is not None:
        found = choice.result()
        for entry in entries:
            entry.place(found[entry.name][0])
