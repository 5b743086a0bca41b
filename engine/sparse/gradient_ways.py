"""Three exact ways to the gradient of a few entries of a linear layer, behind one function.

dense: the whole g.T @ x, then a gather. compaction: a few small products, and dot products of what they leave
(`compaction.py`). sampled: one dot product an entry. `plan_gradient` chooses the cheapest by costs that are measured
once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.planner.formulas import SAMPLED_NUMEL
from engine.sparse.compaction import ON_GPU, GradientCosts, group_rows
from engine.sparse.grouping import Grouping
from engine.sparse.kernels import sampled_products

Way = Literal["dense", "compaction", "sampled"]
WORTHWHILE = 0.9  # of the dense product's time: what is predicted to save less may well cost more
GATHERED_NUMEL = 2**20  # numbers that compaction may gather at once for any weight
HELD = 6  # 16-bit numbers that stand for one of `sampled_products` while it is made: both factors, in fp32 too


class Workspace:
    """Memory for products, one buffer a device and dtype, shared by all layers: of the products one lives at a time."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """Return (numel,) of undefined content on the device and in the dtype of `like`, until the next call."""
        key = like.device, like.dtype
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._buffers[key][:numel]

    def release(self) -> None:
        """Give the memory back; between two backwards nobody needs it."""
        self._buffers.clear()


@dataclass(frozen=True)
class GradientPlan:
    """How to get the gradient of `count` entries of a weight of `shape`; where they are is told anew each time."""

    way: Way
    shape: tuple[int, int]
    count: int
    grouping: Grouping | None = None
    at_once: int = SAMPLED_NUMEL  # numbers that sampled products gather at a time

    @property
    def multiplied(self) -> int:
        """Entries of the products that are computed: out * in for the dense one."""
        if self.way == "dense":
            return self.shape[0] * self.shape[1]
        return self.count if self.grouping is None else self.grouping.numel + self.grouping.num_sampled


def plan_gradient(
    parts: Sequence[Tensor], shape: tuple[int, int], tokens: int, costs: GradientCosts, way: Way | Literal["auto"]
) -> GradientPlan:
    """Return how to get the gradient of the entries of all `parts`: the same arguments give the same plan.

    Args:
        parts: (n,) flat positions each, in any order, n >= 1 in all.
        shape: (out_features, in_features).
        tokens: of a micro-batch.
        costs: what `auto` compares; they also decide the products of `compaction`.
        way: take this one, or `auto` for the cheapest.
    """
    count = sum(part.numel() for part in parts)
    if way == "dense" or way == "sampled":
        return GradientPlan(way, shape, count)
    if parts[0].is_meta:  # no numbers to go by: the way that takes the most memory
        return GradientPlan("dense", shape, count)
    grouping, grouped_s = group_rows(parts, shape, tokens, costs, ON_GPU if parts[0].is_cuda else 1)
    dense_s = costs.call_s + tokens * costs.multiply_s * shape[0] * shape[1]
    if way == "auto" and grouped_s >= WORTHWHILE * dense_s:
        return GradientPlan("dense", shape, count)
    at_once = min(SAMPLED_NUMEL, (shape[0] * shape[1] - grouping.numel) // HELD)  # in the memory of the dense gradient
    if not grouping.products:
        return GradientPlan("sampled", shape, count, at_once=at_once)
    return GradientPlan("compaction", shape, count, grouping, at_once)


def values_gradients(
    grad_y: Tensor, x: Tensor, plan: GradientPlan, indices: Sequence[Tensor], workspace: Workspace
) -> list[Tensor]:
    """Return the entries of grad_y.T @ x at each of `indices`, (n,) each, in fp32 (fp64 of fp64).

    Args:
        grad_y: (tokens, out_features).
        x: (tokens, in_features), same dtype.
        plan: of `plan_gradient` for these `indices`.
        indices: (n,) flat positions each, as the plan knows them.
        workspace: for the products.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if plan.way == "sampled":
        return [sampled_products(grad_y, x, each, plan.at_once) for each in indices]
    if plan.grouping is None:
        dense = dense_gradient(grad_y, x, workspace).view(-1)
        return [dense.index_select(0, each).to(dtype) for each in indices]
    found = _grouped(grad_y, x, indices, plan.grouping, dtype, workspace)
    for part, (total, each) in enumerate(zip(found, indices, strict=True)):
        plan.grouping.put_sampled(total, part, each, grad_y, x, plan.at_once)
    return found


def dense_gradient(grad_y: Tensor, x: Tensor, workspace: Workspace) -> Tensor:
    """Return grad_y.T @ x, (out_features, in_features), in the workspace: valid until that is used again."""
    shape = grad_y.shape[1], x.shape[1]
    return torch.mm(grad_y.T, x, out=workspace.take(shape[0] * shape[1], x).view(shape))


def _grouped(
    grad_y: Tensor, x: Tensor, indices: Sequence[Tensor], grouping: Grouping, dtype: torch.dtype, workspace: Workspace
) -> list[Tensor]:
    """Add up the products of as many tokens at once as may be gathered in the memory of the dense gradient."""
    products = workspace.take(grouping.numel, x)
    allowed = max(GATHERED_NUMEL, grad_y.shape[1] * x.shape[1] - grouping.numel)
    tokens = max(1, allowed // max(1, grouping.gathered))
    found: list[Tensor] = []
    for left, right in zip(grad_y.split(tokens), x.split(tokens), strict=True):
        grouping.multiply(left, right, products)
        parts = [grouping.take(products, each, dtype) for each in indices]
        found = [total.add_(part) for total, part in zip(found, parts, strict=True)] if found else parts
    assert found, "a backward without tokens"
    return found
