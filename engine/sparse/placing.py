"""Entries chosen without gradients: at random, or by the size of the weights."""

from collections.abc import Sequence

import torch

from engine.sparse.base_weight import NF4Weight
from engine.sparse.entries import ActiveEntries
from engine.sparse.selection import GlobalChoice, index_dtype, largest_places, select_random_indices
from engine.sparse.structure import select_random_structured_indices, select_structured_indices
from engine.spec import RunSpec, Structure


def place_random(entries: Sequence[ActiveEntries], structure: Structure, generator: torch.Generator) -> None:
    """Choose the entries at random: the control of both papers."""
    for entry in entries:
        if structure == "free":
            entry.place(select_random_indices(entry.weight.numel(), entry.num_active, generator))
        else:
            shape = tuple(entry.weight.shape)
            entry.place(select_random_structured_indices(shape, entry.num_active, structure, generator))


def place_by_magnitude(entries: Sequence[ActiveEntries], spec: RunSpec) -> None:
    """Choose the entries of largest or smallest |weight|, which needs no data; `spec` says which, and how spread."""
    largest = spec.magnitude == "largest"
    choice = GlobalChoice(sum(entry.num_active for entry in entries)) if spec.allocation == "global" else None
    for entry in entries:
        weight = entry.weight
        magnitude = (weight.dense() if isinstance(weight, NF4Weight) else weight.detach()).abs()
        if choice is not None:
            choice.add(entry.name, magnitude if largest else -magnitude, magnitude)
        elif spec.structure != "free":
            entry.place(select_structured_indices(magnitude, entry.num_active, spec.structure, largest=largest))
        else:
            flat = magnitude.flatten()
            top = largest_places(flat if largest else flat.neg_(), entry.num_active)
            entry.place(top.sort().values.to(index_dtype(flat.numel())))
    if choice is not None:
        found = choice.result()
        for entry in entries:
            entry.place(found[entry.name][0])
