"""The gradients of the entries of linear layers: a plan for each weight, made anew whenever its entries change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from engine.sparse.compaction import GradientCosts
from engine.sparse.entries import ActiveEntries
from engine.sparse.gradient_costs import DEFAULT_COSTS, costs_for
from engine.sparse.gradient_ways import GradientPlan, Way, Workspace, dense_gradient, plan_gradient, values_gradients

COSTS_KEY = "gradient_costs"  # in a checkpoint


@dataclass
class _Planned:
    """A plan, and what it was made for: a placement of the entries, and other positions wanted besides."""

    plan: GradientPlan
    placement: int
    others: Tensor | None


@dataclass
class LinearGradients:
    """Takes the gradients of `entries`, weights of linear layers, from the two factors of the dense one.

    `way`: for every weight, or `auto`: the cheapest for each, by the costs of the first weight's device and dtype.
    `tokens`: of a micro-batch.
    """

    entries: Sequence[ActiveEntries]
    way: Way | Literal["auto"]
    tokens: int
    _planned: dict[str, _Planned] = field(default_factory=dict)
    _workspace: Workspace = field(default_factory=Workspace)
    _costs: GradientCosts = DEFAULT_COSTS

    def __post_init__(self) -> None:
        """Read or measure the costs that plans are made by, where any are to be made."""
        if self.entries and self.way in ("auto", "compaction"):
            first, largest = self.entries[0].weight, max(entry.weight.numel() for entry in self.entries)
            self._costs = costs_for(first.device, first.dtype, largest)

    def dense(self, grad_y: Tensor, x: Tensor) -> Tensor:
        """Return the dense gradient of a weight, (out_features, in_features): valid until the next gradient.

        Args:
            grad_y: (tokens, out_features).
            x: (tokens, in_features).
        """
        return dense_gradient(grad_y, x, self._workspace)

    def gather(
        self, entry: ActiveEntries, others: Tensor | None, grad_y: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the entries, (num_active,), and of the entries at `others`, (n,) flat positions."""
        wanted = (entry.placed,) if others is None else (entry.placed, others)
        found = values_gradients(grad_y, x, self._plan(entry, others), wanted, self._workspace)
        return found[0], None if others is None else found[1]

    def prepare(self, others: Callable[[ActiveEntries], Tensor | None]) -> None:
        """Make the plans for the entries as they are now, and for those that `others` says are wanted besides."""
        for entry in self.entries:
            if entry.is_placed:
                self._plan(entry, others(entry))

    def release(self) -> None:
        """Give the memory of the products back: a backward is over."""
        self._workspace.release()

    def multiplied(self) -> int:
        """Return how many entries of dense gradients the weights whose entries are placed need computed."""
        return sum(self._plan(entry, None).multiplied for entry in self.entries if entry.is_placed)

    def _plan(self, entry: ActiveEntries, others: Tensor | None) -> GradientPlan:
        known = self._planned.get(entry.name)
        if known is None or known.placement != entry.placement or known.others is not others:
            out_features, in_features = entry.weight.shape
            shape = out_features, in_features
            parts = (entry.placed,) if others is None else (entry.placed, others)
            plan = plan_gradient(parts, shape, self.tokens, self._costs, self.way)
            known = self._planned[entry.name] = _Planned(plan, entry.placement, others)
        return known.plan

    def state(self) -> dict[str, Tensor]:
        """Return what another session needs to make the same plans."""
        return {COSTS_KEY: torch.tensor(astuple(self._costs), dtype=torch.float64)} if self.entries else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        numbers = state[COSTS_KEY].tolist() if COSTS_KEY in state else []
        if len(numbers) == len(fields(GradientCosts)):  # earlier versions knew fewer costs
            self._costs = GradientCosts(*numbers)
            self._planned.clear()
