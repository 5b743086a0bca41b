"""SIFT: the entries with the largest first gradients are trained, and stay chosen (arXiv:2312.11875, section 4.1).

The gradient that chooses is the accumulated one of the first `micro_steps` micro-batches; by default those of the first
optimizer step, and the same gradient then makes the first update. Fisher selection (FISH Mask, arXiv:2111.09839) sums
the squares of the same gradients instead.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from engine.sparse.entries import ActiveEntries
from engine.sparse.peers import ALONE, Peers
from engine.sparse.selection import GlobalChoice, all_finite, select_topk_indices
from engine.sparse.structure import select_structured_indices
from engine.spec import Structure

Place = Callable[[ActiveEntries, Tensor], None]


def add_in_host_memory(sums: dict[str, Tensor], entry: ActiveEntries, grad: Tensor) -> None:
    """Add the dense gradient of one weight to its sum in host memory, in the dtype of the values.

    It goes there in its own: a GPU converts before it copies, and would hold the weight's gradient in fp32 as well.
    """
    here = grad.cpu()
    if entry.name in sums:
        sums[entry.name].add_(here)
    else:
        sums[entry.name] = here.to(entry.values.dtype, copy=True)


def take_sums(
    sums: dict[str, Tensor], entries: Iterable[ActiveEntries], peers: Peers
) -> Iterator[tuple[ActiveEntries, Tensor]]:
    """Yield each weight that a gradient reached, and the sum of its dense gradients over all processes, on its device.

    One weight's is there at a time; `sums` is empty afterwards.

    Args:
        sums: of this process, by name.
        entries: in which a gradient may have come, the same in every process.
        peers: the processes. Each sends the dense gradient of every weight once.
    """
    entries = [*entries]
    reached = peers.totals([entry.name in sums for entry in entries])
    for entry in (entry for entry, times in zip(entries, reached, strict=True) if times):
        own = sums.pop(entry.name, None)
        if own is None:  # a gradient came in another process only, as of an expert that no token here visited
            own = torch.zeros(tuple(entry.weight.shape), dtype=entry.values.dtype)
        dense = own.to(entry.weight.device)
        peers.add(dense)
        yield entry, dense


def groups_within(entries: Iterable[ActiveEntries], budget_bytes: int) -> list[list[ActiveEntries]]:
    """Return `entries` in groups whose dense gradients, in the dtype of the values, take up to `budget_bytes` each.

    An entry that alone takes more is a group of its own.
    """
    groups: list[list[ActiveEntries]] = []
    left = 0
    for entry in entries:
        num_bytes = entry.weight.numel() * entry.values.element_size()
        if not groups or num_bytes > left:
            groups.append([])
            left = budget_bytes
        groups[-1].append(entry)
        left -= num_bytes
    return groups


class GradientSelection:
    """Watches dense gradients and places the entries of each weight by them.

    With one micro-batch a weight's entries are placed inside the backward and no dense gradient outlives it. With
    more, in this process or over all, the dense gradients are summed in host memory: the bytes of the watched targets
    in fp32. With one budget for all weights they are placed after the last micro-batch.
    """

    def __init__(
        self,
        entries: Sequence[ActiveEntries],
        micro_steps: int,
        place: Place = ActiveEntries.place,
        *,
        keep_gradient: bool = True,
        squared: bool = False,
        choice: GlobalChoice | None = None,
        structure: Structure = "free",
        peers: Peers = ALONE,
    ) -> None:
        """Begin to watch.

        Args:
            entries: the targets to choose in; gradients of others are passed over.
            micro_steps: micro-batches of this process whose summed gradient chooses, at least 1.
            place: puts the entries of a weight where they are to be trained.
            keep_gradient: whether the chosen entries' gradient becomes `values.grad` for the coming update.
            squared: choose by the sum of squared gradients; nothing is kept for an update then.
            choice: one budget over all weights instead of one for each; `finish` places them.
            structure: which entries of a weight may be chosen together; `free` with `choice`.
            peers: processes that choose together, by the sum over all their micro-batches.
        """
        self._entries = {entry.name: entry for entry in entries}
        self._left = micro_steps
        self._place = place
        self._keep = keep_gradient and not squared
        self._squared = squared
        self._choice = choice
        self._structure: Structure = structure
        self._peers = peers
        self._sums: dict[str, Tensor] | None = {} if micro_steps > 1 or peers.count > 1 else None
        self.overflowed = False
        """Whether a gradient was not finite: what was chosen by it, if anything, is of no use."""

    @property
    def done(self) -> bool:
        """Whether all micro-batches are over."""
        return self._left == 0

    def watches(self, entry: ActiveEntries) -> bool:
        """Whether the gradient of this weight is wanted."""
        return entry.name in self._entries

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight in one micro-batch."""
        if not self.watches(entry):
            return
        if self._squared:
            grad = grad.to(entry.values.dtype).square()
        if self._sums is None:
            self._choose(entry, grad)
        else:
            add_in_host_memory(self._sums, entry, grad)

    def end_micro_step(self) -> None:
        """Count a micro-batch; after the last one, choose where that was not done yet."""
        self._left -= 1
        if self._left or self._sums is None:
            return
        for entry, dense in take_sums(self._sums, self._entries.values(), self._peers):
            self._choose(entry, dense)

    def finish(self, entries: Iterable[ActiveEntries]) -> None:
        """Place `entries`, where all of them share one budget: their scores are complete now."""
        if self._choice is None or self.overflowed:
            return
        found = self._choice.result()
        for entry in entries:
            if entry.name in found:
                indices, grad = found[entry.name]
                self._place(entry, indices)
                self._take_gradient(entry, grad)

    def _choose(self, entry: ActiveEntries, grad: Tensor) -> None:
        if not all_finite([grad]):
            self.overflowed = True
        elif self._choice is not None:
            self._choice.add(entry.name, grad.abs(), grad)
        else:
            self._place(entry, self._best(grad, entry.num_active))
            self._take_gradient(entry, entry.gather(grad))

    def _best(self, scores: Tensor, count: int) -> Tensor:
        if self._structure == "free":
            return select_topk_indices(scores, count)
        return select_structured_indices(scores, count, self._structure, norm=1.0 if self._squared else 2.0)

    def _take_gradient(self, entry: ActiveEntries, grad: Tensor) -> None:
        if self._keep:  # the sum over all processes, which will be summed once more: the first one has all of it
            entry.values.grad = grad.to(entry.values) if self._peers.is_first else torch.zeros_like(entry.values)
