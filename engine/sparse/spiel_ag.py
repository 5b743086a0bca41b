"""SpIEL-AG: entries are grown by the mean gradient of a few candidates (arXiv:2401.16405, section 3.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import EntrySeeds, SparseAdamW
from engine.sparse.peers import ALONE, Peers
from engine.sparse.selection import GlobalChoice, all_finite, finite_flag, select_topk_indices
from engine.sparse.sift import add_in_host_memory, take_sums
from engine.sparse.spiel import Reselected, Schedule, choose_drop, exchange, replace_entries


@dataclass
class Candidates:
    """The growth candidates of one weight: the sums over the estimation phase of g and g^2 per optimizer step.

    Each is kept only where there is one, so that a backward begins beside the sums alone, and the first of a phase
    beside none.
    """

    indices: Tensor  # (num_active,) sorted
    grad: Tensor | None = None  # (num_active,) of the step in progress, summed over its micro-batches
    total: Tensor | None = None  # (num_active,)
    squares: Tensor | None = None  # (num_active,)

    def add(self, grad: Tensor) -> None:
        """Add the gradient of a micro-batch, (num_active,), which is kept."""
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def close_step(self, clip: Tensor | float) -> None:
        """Add the gradient of the step, times `clip`, to the sums."""
        if self.grad is None:
            return
        grad, self.grad = self.grad.mul_(clip), None
        if self.total is None or self.squares is None:
            self.total, self.squares = grad, grad.square()
        else:
            self.total.add_(grad)
            self.squares.addcmul_(grad, grad)


class SpielAG:
    """SpIEL-AG: growth by the gradient of candidates, averaged over the estimation phase.

    Candidates are the `num_active` largest entries of the first step's dense gradient. Where that step has several
    micro-batches, in this process or over all, their dense gradients are summed in host memory. With one budget over
    all weights, candidates, dropped and grown entries are the best of all weights taken as one.
    """

    def __init__(
        self,
        entries: Sequence[ActiveEntries],
        optimizer: SparseAdamW,
        schedule: Schedule,
        micro_steps: int,
        *,
        together: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        """Work on `entries`, whose optimizer tracks ages; a step has `micro_steps` micro-batches in each process.

        Args:
            entries: all targets.
            optimizer: over their values.
            schedule: when and how many.
            micro_steps: in one optimizer step.
            together: one budget over all weights.
            peers: processes that choose together.
        """
        self._entries = entries
        self._micro_steps = micro_steps
        self._optimizer = optimizer
        self._schedule = schedule
        self._together = together
        self._phase_step = 0
        self._peers = peers
        self._sums: dict[str, Tensor] = {}
        self._summing = False  # whether dense gradients are being summed up
        self._choice: GlobalChoice | None = None
        self._overflowed = False
        self._watched: frozenset[str] = frozenset()
        self.candidates: dict[str, Candidates] = {}

    def begin_step(self, step: int) -> None:
        """Begin a step, or begin it again; where a phase begins, its candidates are to be chosen."""
        self._phase_step = self._schedule.phase_step(step)
        self._sums = {}
        self._summing = self.begins_phase and self._micro_steps * self._peers.count > 1
        self._choice = None
        self._overflowed = False
        self._watched = frozenset(entry.name for entry in self._entries)
        if self._phase_step == 1:
            self.candidates = {}
            self._choice = GlobalChoice(sum(entry.num_active for entry in self._entries)) if self._together else None
        self._forget_gradients()

    @property
    def begins_phase(self) -> bool:
        """Whether candidates are to be chosen in the step in progress."""
        return self._phase_step == 1

    def begin_pass(self, entries: Sequence[ActiveEntries]) -> None:
        """Sum the coming gradients of `entries` only, until `end_pass`; for where main memory lacks."""
        self._watched = frozenset(entry.name for entry in entries)
        self._summing = True

    def end_pass(self, last: bool) -> None:
        """Choose the candidates of the weights watched; after the last pass their gradients are gathered as usual."""
        self._choose_from_sums()
        if last:
            self._finish_choice()
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        for candidates in self.candidates.values():
            candidates.grad = None

    def wants_dense(self, entry: ActiveEntries) -> bool:
        """Whether the candidates of this weight are to be chosen from the gradient that comes."""
        return bool(self._phase_step) and entry.name not in self.candidates and entry.name in self._watched

    def wanted(self, entry: ActiveEntries) -> Tensor | None:
        """Return the positions of the candidates while a phase lasts."""
        return self.candidates[entry.name].indices if self._phase_step and entry.name in self.candidates else None

    def observe_wanted(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Add up the gradient of the candidates."""
        self.candidates[entry.name].add(grad.to(entry.values.dtype))

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """In a phase, sum the dense gradient (first step) or gather the candidates' entries (later steps)."""
        candidates = self.wanted(entry)
        if candidates is not None:
            self.observe_wanted(entry, grad.reshape(-1).index_select(0, candidates))
        elif not self.wants_dense(entry):
            return
        elif self._summing:
            add_in_host_memory(self._sums, entry, grad)
        else:
            self._choose_candidates(entry, grad)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the candidates in this step, which the processes of a run have to sum."""
        if not self._phase_step:
            return []
        found = []
        for entry in self._entries:
            if entry.name in self.candidates:
                candidates = self.candidates[entry.name]
                if candidates.grad is None:  # none came in this process
                    candidates.grad = torch.zeros_like(candidates.indices, dtype=entry.values.dtype)
                found.append(candidates.grad)
        return found

    def chooses_in(self, step: int) -> bool:
        """Return whether a phase begins or ends in `step`."""
        return self._schedule.phase_step(step) == 1 or self._schedule.reselects_after(step)

    def finite(self) -> Tensor | bool:
        """Return whether the gradient of the candidates in this step is finite; all backwards are over."""
        if not self._phase_step:
            return True
        self._choose_from_sums()
        if self._overflowed:
            return False
        self._finish_choice()
        grads = [candidates.grad for candidates in self.candidates.values() if candidates.grad is not None]
        return not grads or finite_flag(grads)

    def end_step(self, step: int, clip: Tensor | float) -> Reselected | None:
        """Close the step's gradient; at the end of a phase, reselect."""
        self._choose_from_sums()
        self._finish_choice()
        if self._phase_step:
            for candidates in self.candidates.values():
                candidates.close_step(clip)
        if not self._schedule.reselects_after(step):
            return None
        groups = [self._entries] if self._together else [[entry] for entry in self._entries]
        replaced = sum(self._reselect(group, step) for group in groups)
        self.candidates = {}
        return Reselected(replaced, sum(entry.num_active for entry in self._entries))

    def _choose_from_sums(self) -> None:
        if self._summing:
            self._summing = False
            watched = [entry for entry in self._entries if entry.name in self._watched]
            for entry, dense in take_sums(self._sums, watched, self._peers):
                self._choose_candidates(entry, dense)

    def _choose_candidates(self, entry: ActiveEntries, dense: Tensor) -> None:
        if not all_finite([dense]):
            self._overflowed = True
            return
        if self._choice is not None:
            self._choice.add(entry.name, dense.abs(), dense)
            return
        indices = select_topk_indices(dense, entry.num_active)
        self._set_candidates(entry, indices, dense.reshape(-1).index_select(0, indices))

    def _finish_choice(self) -> None:
        if self._choice is None:
            return
        found, self._choice = self._choice.result(), None
        for entry in self._entries:
            if entry.name in found:
                self._set_candidates(entry, *found[entry.name])

    def _set_candidates(self, entry: ActiveEntries, indices: Tensor, grad: Tensor) -> None:
        self.candidates[entry.name] = Candidates(indices, grad.to(entry.values.dtype))

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint between two steps needs: the candidates of a phase in progress."""
        return {
            f"{name}.candidates.{part}": tensor
            for name, candidates in self.candidates.items()
            for part in ("indices", "total", "squares")
            if (tensor := getattr(candidates, part)) is not None
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.candidates = {}
        for entry in self._entries:
            if f"{entry.name}.candidates.indices" in state:
                prefix = f"{entry.name}.candidates."
                parts = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
                self.candidates[entry.name] = Candidates(
                    **{part: sums.to(entry.weight.device) for part, sums in parts.items()}
                )

    def _reselect(self, entries: Sequence[ActiveEntries], step: int) -> int:
        """Replace entries of weights that share a budget; return how many."""
        found = [
            (entry, each.indices, each.total, each.squares)
            for entry in entries
            if (each := self.candidates.get(entry.name)) and each.total is not None and each.squares is not None
        ]
        seen = [entry for entry, *_ in found]
        count = self._schedule.count(step, sum(entry.num_active for entry in seen))
        if not count:
            return 0
        steps, (beta1, beta2) = self._schedule.estimation_steps, self._optimizer.betas
        old = as_one([(entry.placed, entry.weight.numel()) for entry in seen])
        positions = as_one([(indices, entry.weight.numel()) for entry, indices, _, _ in found])
        values = torch.cat([entry.read_values() for entry in seen])
        mean = torch.cat([total for _, _, total, _ in found]) / steps
        mean_square = torch.cat([squares for *_, squares in found]) / steps
        drop = self._drop(seen, values, count)
        kept = torch.ones(len(old), dtype=torch.bool, device=drop.device)
        kept[drop] = False
        free = ~torch.isin(positions, old[kept])
        largest = torch.where(free, mean.abs(), -1.0).topk(min(len(drop), int(free.sum())), sorted=False).indices
        now, source = exchange(old, values, drop, positions[largest])
        at = torch.searchsorted(positions, now).clamp(max=len(positions) - 1)
        first_moment, second_moment = mean[at] * (1 - beta1**steps), mean_square[at] * (1 - beta2**steps)
        start, begin = 0, 0
        for entry in seen:
            mine = slice(*torch.searchsorted(now, now.new_tensor([start, start + entry.weight.numel()])).tolist())
            places = torch.where(source[mine] >= 0, source[mine] - begin, -1)
            new = (places < 0).nonzero().flatten()
            start, begin, offset = start + entry.weight.numel(), begin + entry.num_active, start
            replace_entries(entry, now[mine] - offset, places)
            seeds = EntrySeeds(new, first_moment[mine][new], second_moment[mine][new], age=steps)
            self._optimizer.remap(entry.values, places, seeds)
        return int((source < 0).sum())

    def _drop(self, entries: Sequence[ActiveEntries], values: Tensor, count: int) -> Tensor:
        """Return the places to drop; where weights share a budget and not all goes, each keeps its largest change."""
        if len(entries) == 1 or count == len(values):
            return choose_drop(values, count)
        changed = values.abs()
        begin = 0
        for entry in entries:
            part = changed[begin : begin + entry.num_active]
            part[part.argmax()] = float("inf")
            begin += entry.num_active
        return choose_drop(changed, min(count, len(values) - len(entries)))


def as_one(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Return positions in several tensors, int64, as if these lay one behind the other.

    Args:
        parts: (n,) positions in a tensor, and its number of entries.
    """
    shifted, start = [], 0
    for positions, numel in parts:
        shifted.append(positions.long() + start)
        start += numel
    return torch.cat(shifted)
