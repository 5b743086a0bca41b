"""SpIEL: entries are dropped and grown while training (Ansell et al., arXiv:2401.16405, section 3).

Every `period` steps the entries that changed least are dropped and as many are grown: by the mean gradient of a few
candidates (AG, in `spiel_ag.py`), or by the row and column accumulators of SM3 (MA). `Schedule` says when and how many;
the functions choose; `SpielAG` and `SpielMA` do it to a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.sparse.entries import ActiveEntries
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

    def reselections(self, step: int) -> int:
        """Return how many reselections there were up to the one after `step`; as many as an int16 holds at most."""
        return min((step - self.estimation_steps) // self.period + 1, 2**15 - 1)

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


def exchange(old: Tensor, values: Tensor, drop: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions after entries were dropped and others grown in their stead, and where each came from.

    Args:
        old: (n,) int64 positions, sorted.
        values: (n,) changes there.
        drop: (d,) places in `old`.
        grown: (m,) positions, m <= d, not active unless dropped. One that is dropped and grown at once stays; where
            m < d the d - m dropped entries that changed most stay.

    Returns:
        (n,) int64 positions, sorted; (n,) int64 the place of each in `old`, or -1 for one that is new.
    """
    again = torch.isin(old[drop], grown)
    fresh = grown[~torch.isin(grown, old)]
    leaving = drop[~again]
    leaving = leaving[values[leaving].abs().argsort()][: len(fresh)]
    places = torch.arange(len(old), device=old.device)
    places[leaving] = -1
    positions = old.clone()
    positions[leaving] = fresh[: len(leaving)]
    positions, order = positions.sort()
    return positions, places[order]


def replace_entries(entry: ActiveEntries, positions: Tensor, source: Tensor) -> None:
    """Train the entries at `positions`; the others return to the base bit for bit.

    Args:
        entry: the entries of one weight.
        positions: (n,) flat positions, sorted; n need not be what it was.
        source: (n,) int64, the place of each in the arrays of `entry`, whose value it keeps, or -1: it starts with 0.
    """
    values = torch.where(source >= 0, entry.read_values()[source.clamp(min=0)], 0.0)
    entry.place(positions.to(entry.placed.dtype), values)
    entry.write_back()


@dataclass(frozen=True)
class Reselected:
    """What a reselection did: entries replaced over all weights, and entries active."""

    replaced: int
    num_active: int


class Spiel(Protocol):
    """A SpIEL variant at work: fed with dense gradients in the backward, told when a step ends."""

    def begin_step(self, step: int) -> None:
        """Say that the backwards of `step` follow; again where what was done of it came to naught."""

    def wants_dense(self, entry: ActiveEntries) -> bool:
        """Return whether `observe` needs the dense gradient of this weight now."""

    def wanted(self, entry: ActiveEntries) -> Tensor | None:
        """Return the positions, besides the active ones, whose gradient is wanted; None where there are none."""

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight in one micro-batch."""

    def observe_wanted(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the gradient at the positions that `wanted` gave, in one micro-batch."""

    def gradients(self) -> list[Tensor]:
        """Return the gradients that were taken besides those of the values, in this step."""

    def chooses_in(self, step: int) -> bool:
        """Return whether candidates or entries are chosen in `step`: in others nobody waits for the device."""

    def finite(self) -> Tensor | bool:
        """Return whether what was seen of the gradient in this step is finite; all backwards are over.

        A 0-dim tensor where only the device knows.
        """

    def end_step(self, step: int, clip: Tensor | float) -> Reselected | None:
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
        # The reselection that chose each entry, from 1; 0 for the random start. AG reads it off Adam's ages instead.
        self._born = {entry.name: torch.zeros_like(entry.values, dtype=torch.int16) for entry in entries}

    def begin_step(self, step: int) -> None:
        """Nothing to prepare."""

    def wants_dense(self, entry: ActiveEntries) -> bool:
        """No dense gradient is wanted."""
        return False

    def wanted(self, entry: ActiveEntries) -> Tensor | None:
        """No other gradient is wanted."""
        return None

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Nothing to watch: the optimizer knows."""

    def observe_wanted(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Nothing to watch either."""

    def gradients(self) -> list[Tensor]:
        """None are taken."""
        return []

    def chooses_in(self, step: int) -> bool:
        """Return whether entries are replaced after `step`."""
        return self._schedule.reselects_after(step)

    def finite(self) -> bool:
        """Nothing was seen."""
        return True

    def end_step(self, step: int, clip: Tensor | float) -> Reselected | None:
        """Reselect if it is time."""
        if not self._schedule.reselects_after(step):
            return None
        replaced = 0
        for entry in self._entries:
            count = self._schedule.count(step, entry.num_active)
            if count:
                state = self._optimizer.state[entry.values]
                grown = grow_by_momenta(state["row_max"], state["column_max"], entry.placed, count)
                values = entry.read_values()
                positions, source = exchange(entry.placed.long(), values, choose_drop(values, count), grown)
                replace_entries(entry, positions, source)
                born = self._born[entry.name]
                self._born[entry.name] = torch.where(source < 0, self._schedule.reselections(step), born[source])
                replaced += int((source < 0).sum())
        return Reselected(replaced, sum(entry.num_active for entry in self._entries))

    def state(self) -> dict[str, Tensor]:
        """Return when each entry was chosen; the accumulators are the optimizer's."""
        return {f"{name}.born": born for name, born in self._born.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for entry in self._entries:
            self._born[entry.name] = state[f"{entry.name}.born"].to(entry.values.device)
