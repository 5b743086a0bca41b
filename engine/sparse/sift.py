"""SIFT: the entries with the largest first gradients are trained, and stay chosen (arXiv:2312.11875, section 4.1).

The gradient that chooses is the accumulated one of the first `micro_steps` micro-batches; by default those of the first
optimizer step, and the same gradient then makes the first update. Fisher selection (FISH Mask, arXiv:2111.09839) sums
the squares of the same gradients instead.
"""

from collections.abc import Sequence

from torch import Tensor

from engine.sparse.entries import ActiveEntries
from engine.sparse.selection import select_topk_indices


def add_in_host_memory(sums: dict[str, Tensor], entry: ActiveEntries, grad: Tensor) -> None:
    """Add the dense gradient of one weight to its sum in host memory, in the dtype of the values."""
    if entry.name in sums:
        sums[entry.name].add_(grad.to("cpu", entry.values.dtype))
    else:
        sums[entry.name] = grad.to("cpu", entry.values.dtype, copy=True)


class FirstGradientSelection:
    """Watches the first dense gradients and places the entries of each weight by them.

    With one micro-batch a weight's entries are placed inside the backward and no dense gradient outlives it. With
    more, the dense gradients are summed in host memory: the bytes of the targets in fp32.
    """

    def __init__(
        self,
        entries: Sequence[ActiveEntries],
        micro_steps: int,
        *,
        keep_gradient: bool = True,
        squared: bool = False,
    ) -> None:
        """Begin to watch.

        Args:
            entries: the targets, not yet placed.
            micro_steps: micro-batches whose summed gradient chooses, at least 1.
            keep_gradient: whether the chosen entries' gradient becomes `values.grad` for the coming update.
            squared: choose by the sum of squared gradients; nothing is kept for an update then.
        """
        self._entries = entries
        self._left = micro_steps
        self._keep = keep_gradient and not squared
        self._squared = squared
        self._sums: dict[str, Tensor] | None = {} if micro_steps > 1 else None

    @property
    def done(self) -> bool:
        """Whether every entry is placed."""
        return self._left == 0

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight in one micro-batch."""
        if self._squared:
            grad = grad.to(entry.values.dtype).square()
        if self._sums is None:
            self._choose(entry, grad)
        else:
            add_in_host_memory(self._sums, entry, grad)

    def end_micro_step(self) -> None:
        """Count a micro-batch; after the last one, place what is not placed yet."""
        self._left -= 1
        if self._left or self._sums is None:
            return
        for entry in self._entries:
            if entry.name in self._sums:
                self._choose(entry, self._sums.pop(entry.name).to(entry.weight.device))

    def _choose(self, entry: ActiveEntries, grad: Tensor) -> None:
        entry.place(select_topk_indices(grad, entry.num_active))
        if self._keep:
            entry.values.grad = entry.gather(grad)
