"""SpIEL: entries are dropped and grown while training (Ansell et al., arXiv:2401.16405, section 3).

Every `period` steps the entries that changed least are dropped and as many are grown: by the mean gradient of a few
candidates (AG), or by the row and column accumulators of SM3 (MA). `Reselection` says when and how many; the functions
choose; `SpielAG` and `SpielMA` do it to a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import EntrySeeds, SparseAdamW
from engine.sparse.selection import select_topk_indices
from engine.sparse.sift import add_in_host_memory
from engine.sparse.sm3 import SM3, grow_by_momenta


@dataclass(frozen=True)
class Schedule:
    """When entries are replaced, and what share of them.

    Reselection comes after the update of the steps t = estimation_steps (mod period); the estimation phase is the
    `estimation_steps` steps that end there. The first one replaces all, because the start is random.
    """

    period: int
    estimation_steps: int
    initial_rate: float
    kind: Literal["linear", "cosine"]
    total_steps: int

    def phase_step(self, step: int) -> int:
        """Return the place of `step`, from 1, in its estimation phase, from 1; 0 outside."""
        place = (step - 1) % self.period + 1
        return place if place <= self.estimation_steps else 0

    def reselects_after(self, step: int) -> bool:
        """Return whether entries are replaced after the update of `step`."""
        return self.phase_step(step) == self.estimation_steps

    def count(self, step: int, num_active: int) -> int:
        """Return how many of a weight's `num_active` entries are replaced after `step` (equation 8)."""
        if step == self.estimation_steps:
            return num_active
        if self.kind == "linear":
            rate = self.initial_rate * (1 - step / self.total_steps)
        else:
            rate = self.initial_rate * (1 + math.cos(math.pi * step / self.total_steps)) / 2
        return max(0, int(rate * num_active))


def choose_drop(values: Tensor, count: int) -> Tensor:
    """Return the places, (count,) int64, of the `count` smallest |value|: the entries that changed least."""
    return values.abs().topk(count, largest=False, sorted=False).indices


def replace_entries(entry: ActiveEntries, drop: Tensor, grown: Tensor) -> Tensor:
    """Drop entries and grow others in their stead; indices stay sorted.

    An entry that is dropped and grown at once keeps its value. Weights at dropped entries return to the base bit for
    bit; grown ones start with value 0.

    Args:
        entry: the entries of one weight.
        drop: (n,) places in the arrays of `entry`.
        grown: (m,) flat positions, m <= n, not active unless dropped; where m < n the n - m dropped entries that
            changed most stay.

    Returns:
        (num_active,) int64: for each entry now, its place before, or -1 for one that is new.
    """
    old = entry.placed.long()
    again = torch.isin(old[drop], grown)
    fresh = grown[~torch.isin(grown, old)]
    leaving = drop[~again]
    leaving = leaving[entry.values.detach()[leaving].abs().argsort()][: len(fresh)]
    places = torch.arange(len(old), device=old.device)
    places[leaving] = -1
    positions = old.clone()
    positions[leaving] = fresh[: len(leaving)]
    positions, order = positions.sort()
    source = places[order]
    values = torch.where(source >= 0, entry.values.detach()[source.clamp(min=0)], 0.0)
    entry.place(positions.to(entry.placed.dtype))
    with torch.no_grad():
        entry.values.copy_(values)
    entry.write_back()
    return source


@dataclass(frozen=True)
class Reselected:
    """What a reselection did: entries replaced over all weights, and entries active."""

    replaced: int
    num_active: int


class Spiel(Protocol):
    """A SpIEL variant at work: fed with dense gradients in the backward, told when a step ends."""

    def begin_step(self, step: int) -> None:
        """Say that the backwards of `step` follow."""

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight in one micro-batch."""

    def end_step(self, step: int, clip: float) -> Reselected | None:
        """Reselect if it is time, after the update of `step`; `clip` is the factor its gradient was scaled by."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint between two steps needs besides values and optimizer states."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


class SpielMA:
    """SpIEL-MA: growth by the accumulators of the SM3 optimizer, which cost nothing to keep."""

    def __init__(self, entries: Sequence[ActiveEntries], optimizer: SM3, schedule: Schedule) -> None:
        """Work on `entries`, whose optimizer must be SM3."""
        self._entries = entries
        self._optimizer = optimizer
        self._schedule = schedule

    def begin_step(self, step: int) -> None:
        """Nothing to prepare."""

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Nothing to watch: the optimizer knows."""

    def end_step(self, step: int, clip: float) -> Reselected | None:
        """Reselect if it is time."""
        if not self._schedule.reselects_after(step):
            return None
        replaced = 0
        for entry in self._entries:
            count = self._schedule.count(step, entry.num_active)
            if count:
                state = self._optimizer.state[entry.values]
                grown = grow_by_momenta(state["row_max"], state["column_max"], entry.placed, count)
                source = replace_entries(entry, choose_drop(entry.values.detach(), count), grown)
                replaced += int((source < 0).sum())
        return Reselected(replaced, sum(entry.num_active for entry in self._entries))

    def state(self) -> dict[str, Tensor]:
        """Nothing: the accumulators are the optimizer's."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take back."""


@dataclass
class Candidates:
    """The growth candidates of one weight: the sums over the estimation phase of g and g^2 per optimizer step."""

    indices: Tensor  # (num_active,) sorted
    grad: Tensor  # (num_active,) of the step in progress, summed over its micro-batches
    total: Tensor  # (num_active,)
    squares: Tensor  # (num_active,)


class SpielAG:
    """SpIEL-AG: growth by the gradient of candidates, averaged over the estimation phase.

    Candidates are the `num_active` largest entries of the first step's dense gradient. Where that step has several
    micro-batches, their dense gradients are summed in host memory.
    """

    def __init__(
        self, entries: Sequence[ActiveEntries], optimizer: SparseAdamW, schedule: Schedule, micro_steps: int
    ) -> None:
        """Work on `entries`, whose optimizer tracks ages; a step has `micro_steps` micro-batches."""
        self._entries = entries
        self._micro_steps = micro_steps
        self._optimizer = optimizer
        self._schedule = schedule
        self._phase_step = 0
        self._sums: dict[str, Tensor] = {}
        self.candidates: dict[str, Candidates] = {}

    def begin_step(self, step: int) -> None:
        """Begin a new phase where one begins."""
        self._phase_step = self._schedule.phase_step(step)
        if self._phase_step == 1:
            self.candidates = {}

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """In a phase, sum the dense gradient (first step) or gather the candidates' entries (later steps)."""
        if self._phase_step == 1 and self._micro_steps == 1:
            self._choose_candidates(entry, grad)
        elif self._phase_step == 1:
            add_in_host_memory(self._sums, entry, grad)
        elif self._phase_step:
            candidates = self.candidates[entry.name]
            candidates.grad.add_(grad.reshape(-1).index_select(0, candidates.indices))

    def end_step(self, step: int, clip: float) -> Reselected | None:
        """Close the step's gradient; at the end of a phase, reselect."""
        for entry in self._entries:
            if entry.name in self._sums:
                self._choose_candidates(entry, self._sums.pop(entry.name).to(entry.weight.device))
        if self._phase_step:
            for candidates in self.candidates.values():
                candidates.grad.mul_(clip)
                candidates.total.add_(candidates.grad)
                candidates.squares.addcmul_(candidates.grad, candidates.grad)
                candidates.grad.zero_()
        if not self._schedule.reselects_after(step):
            return None
        replaced = sum(self._reselect(entry, self._schedule.count(step, entry.num_active)) for entry in self._entries)
        self.candidates = {}
        return Reselected(replaced, sum(entry.num_active for entry in self._entries))

    def _choose_candidates(self, entry: ActiveEntries, dense: Tensor) -> None:
        indices = select_topk_indices(dense, entry.num_active)
        grad = dense.reshape(-1).index_select(0, indices).to(entry.values.dtype)
        self.candidates[entry.name] = Candidates(indices, grad, torch.zeros_like(grad), torch.zeros_like(grad))

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint between two steps needs: the candidates of a phase in progress."""
        return {
            f"{name}.candidates.{part}": getattr(candidates, part)
            for name, candidates in self.candidates.items()
            for part in ("indices", "total", "squares")
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.candidates = {}
        for entry in self._entries:
            if f"{entry.name}.candidates.indices" in state:
                indices, total, squares = (
                    state[f"{entry.name}.candidates.{part}"].to(entry.weight.device)
                    for part in ("indices", "total", "squares")
                )
                self.candidates[entry.name] = Candidates(indices, torch.zeros_like(total), total, squares)

    def _reselect(self, entry: ActiveEntries, count: int) -> int:
        if not count:
            return 0
        candidates, steps = self.candidates[entry.name], self._schedule.estimation_steps
        mean, mean_square = candidates.total / steps, candidates.squares / steps
        positions = candidates.indices.long()
        drop = choose_drop(entry.values.detach(), count)
        kept = torch.ones(entry.num_active, dtype=torch.bool, device=drop.device)
        kept[drop] = False
        free = ~torch.isin(positions, entry.placed.long()[kept])
        largest = torch.where(free, mean.abs(), -1.0).topk(min(count, int(free.sum())), sorted=False).indices
        source = replace_entries(entry, drop, positions[largest])
        new = (source < 0).nonzero().flatten()
        at = torch.searchsorted(positions, entry.placed.long()[new])
        beta1, beta2 = self._optimizer.betas
        seeds = EntrySeeds(new, mean[at] * (1 - beta1**steps), mean_square[at] * (1 - beta2**steps), age=steps)
        self._optimizer.remap(entry.values, source, seeds)
        return len(new)
