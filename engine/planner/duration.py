"""How long a step takes: its operations from the shape, over a rate measured on the same device.

Without a measured rate there is no time: the share of a card's peak that a run reaches differs too much to guess.
"""

import math
from functools import lru_cache

from engine.planner.shape import ModelShape
from engine.planner.target_sizes import TargetSizes
from engine.planner.workload import Workload
from engine.targets import is_linear, layer_number

_CAUSAL = {"flash": 0.5, "efficient": 0.5}  # kernels that skip the half of the scores that a token may not see


def step_flops(work: Workload) -> float:
    """Return the floating point operations of one optimizer step of all processes; a multiply-add counts as two.

    For each micro-batch of T tokens: the forward of each matrix of P entries takes 2 P T, of attention
    4 s q T a layer (scores and weighted values; half where the kernel skips the masked half). The backward takes as
    much again for the gradient of the inputs in the blocks that a gradient reaches, twice for attention, and 2 P T for
    the dense gradient of each target matrix, of which the selected entries are taken. What is not kept is computed once
    more: a block's forward, or its first products of the MLP. Adapters: 6 operations an entry and token. Left out, a
    few percent: norms, activations, the optimizer's step.
    """
    shape, setting = work.shape, work.setting
    matrices = _matrix_entries(shape)
    head = shape.vocabulary * shape.hidden
    attention = 4 * setting.length * shape.heads * shape.head_dim * _CAUSAL.get(setting.kernel, 1.0)
    forward = sum(2 * entries + attention for entries in matrices)
    reached = [2 * entries + 2 * attention for entries in matrices[work.lowest :]]
    dense = 0 if work.adapted else 2 * _dense_entries(shape, work.targets)
    adapters = 6 * work.num_active if work.adapted else 0
    recomputed = sum(_recomputed(work, layer, 2 * entries + attention) for layer, entries in enumerate(matrices))
    per_token = forward + recomputed + sum(reached) + 4 * head + dense + adapters
    return per_token * setting.tokens * work.spec.gradient_accumulation * work.spec.num_processes


def _recomputed(work: Workload, layer: int, forward: float) -> float:
    """Return the operations a token that the backward of a block does again, `forward` being those of its forward."""
    kept, shape = work.kept[layer], work.shape
    if not kept.inside:
        return forward
    return 0.0 if kept.gates else 2 * shape.hidden * shape.ffn * (2 if shape.layout.gated else 1)


def _visited(shape: ModelShape, sizes: tuple[int, ...]) -> float:
    """Return the share of a weight that a token passes: of experts, those it visits."""
    return min(1.0, shape.experts_per_token / sizes[0]) if len(sizes) == 3 and shape.experts_per_token else 1.0


@lru_cache(maxsize=16)
def _matrix_entries(shape: ModelShape) -> list[float]:
    blocks = [0.0] * shape.layers
    for name, sizes in shape.tensors.items():
        layer = layer_number(name)
        if layer is not None and layer < shape.layers and is_linear(name, sizes):
            blocks[layer] += math.prod(sizes) * _visited(shape, sizes)
    return blocks


@lru_cache(maxsize=64)
def _dense_entries(shape: ModelShape, targets: TargetSizes) -> float:
    return sum(
        numel * _visited(shape, shape.tensors[name])
        for name, numel in targets.numels.items()
        if len(shape.tensors[name]) > 1 and not (name == shape.embedding and not shape.tied)
    )
