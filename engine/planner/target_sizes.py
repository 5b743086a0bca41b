"""What a plan needs to know of a model's weights and targets, whatever the batch: worked out once for many plans."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from engine.planner import formulas
from engine.planner.encoders import is_pooler
from engine.planner.layouts import is_before_blocks
from engine.planner.shape import ModelShape, target_tensors
from engine.targets import adapted_weights, is_linear_layer, layer_number, num_active_of


@dataclass(frozen=True, eq=False)
class TargetSizes:
    """The targets of a spec: entries of each, and the largest.

    `accumulators`: rows and columns of all targets, each seen as a matrix whose columns are its last dimension.
    `lowest`: the first block that a gradient reaches; there is none above the last one. `embedding`: whether one of
    tokens or positions, or a norm over them, is among them. `functions`: names of plain linear layers.
    `outside`: of targets outside the blocks. `alike`: for each block the first one with weights of the same names and
    sizes, of which the same are targets.
    """

    numels: Mapping[str, int]
    largest: str
    accumulators: int
    lowest: int
    embedding: bool
    functions: frozenset[str]
    outside: tuple[str, ...]
    alike: tuple[int, ...]


@lru_cache(maxsize=16)
def num_active(targets: TargetSizes, density: float, num_trainable: int | None) -> Mapping[str, int]:
    """Return how many entries of each target are trained; see `num_active_of`."""
    return num_active_of(targets.numels, density, num_trainable)


@lru_cache(maxsize=16)
def quantised_weights(shape: ModelShape) -> Mapping[str, int]:
    """Return the entries of each weight that bitsandbytes quantises: linear layers, BERT's pooler, no experts."""
    stored = {name: sizes for name, sizes in shape.tensors.items() if is_linear_layer(name, sizes) or is_pooler(name)}
    return {name: math.prod(sizes) for name, sizes in stored.items()}


def widths_of(shape: ModelShape, names: Iterable[str]) -> dict[str, int]:
    """Return the last dimension of each."""
    return {name: shape.tensors[name][-1] for name in names}


@lru_cache(maxsize=16)
def indices_bytes(
    shape: ModelShape, targets: TargetSizes, density: float, num_trainable: int | None, compact: bool
) -> int:
    """Return the positions of all entries."""
    active = num_active(targets, density, num_trainable)
    return formulas.indices_bytes(targets.numels, active, widths_of(shape, active) if compact else None)


@lru_cache(maxsize=16)
def stored_in_nf4(shape: ModelShape) -> tuple[int, int]:
    """Return the entries that NF4 leaves dense, and the bytes of the others."""
    quantised = quantised_weights(shape).values()
    return shape.num_parameters - sum(quantised), sum(map(formulas.quantised_bytes, quantised))


@lru_cache(maxsize=64)
def sizes_of(shape: ModelShape, targets: str | tuple[str, ...], adapter: Literal["lora", "ia3"] | None) -> TargetSizes:
    """Return the targets of a spec on a model.

    Args:
        shape: of the model.
        targets: of the spec.
        adapter: what is trained beside them, if anything is.

    Raises:
        TargetsError: they match no weight.
    """
    tensors = target_tensors(shape, targets)
    if adapter:
        tensors = {name: shape.tensors[name] for name in adapted_weights(shape.tensors, targets, adapter)}
    numels = {name: math.prod(sizes) for name, sizes in tensors.items()}
    accumulators = sum(numels[name] // sizes[-1] + sizes[-1] for name, sizes in tensors.items())
    layer_of = {name: layer_number(name) for name in numels}
    layers = [layer for layer in layer_of.values() if layer is not None]
    outside = tuple(name for name, layer in layer_of.items() if layer is None)
    embedding = any(is_before_blocks(name) for name in numels)
    lowest = 0 if embedding else min(layers, default=shape.layers)
    plain = () if shape.layout.transposed else (name for name, sizes in tensors.items() if is_linear_layer(name, sizes))
    largest = max(reversed([*numels]), key=lambda name: numels[name])
    alike = _alike(shape, numels)
    return TargetSizes(numels, largest, accumulators, lowest, embedding, frozenset(plain), outside, alike)


def _alike(shape: ModelShape, numels: Mapping[str, int]) -> tuple[int, ...]:
    first: dict[Any, int] = {}
    kinds = (
        tuple((inside, shape.tensors[name], name in numels) for inside, name in block.items()) for block in shape.blocks
    )
    return tuple(first.setdefault(kind, layer) for layer, kind in enumerate(kinds))
