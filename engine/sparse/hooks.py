"""The gradient by hooks, the way of the SIFT paper (arXiv:2312.11875, Figure 5).

A post-accumulate-grad hook on a parameter hands its dense gradient to whoever wants the selected entries, and frees it
before the backward goes on to the next layer: of all dense gradients one is alive at a time. It works on any parameter
of any architecture: linear weights, Conv1D, embeddings, 3-D expert weights, tied weights.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from engine.sparse.entries import ActiveEntries

GradientSink = Callable[[ActiveEntries, Tensor], None]


class GradientHooks:
    """Hooks on the weights of `entries`, which require a gradient until `remove`."""

    def __init__(self, entries: Iterable[ActiveEntries], sink: GradientSink) -> None:
        """Register one hook a target.

        Args:
            entries: the targets, dense.
            sink: called in the backward with the entries and the dense gradient, (shape of the weight) in the dtype
                of the weight. The gradient is freed when the sink returns.
        """
        self._handles = []
        for entry in entries:
            assert isinstance(entry.weight, nn.Parameter), f"{entry.name} is not dense"
            entry.weight.requires_grad_(True)
            self._handles.append(entry.weight.register_post_accumulate_grad_hook(_hook(entry, sink)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _hook(entry: ActiveEntries, sink: GradientSink) -> Callable[[Tensor], None]:
    def take(weight: Tensor) -> None:
        grad, weight.grad = weight.grad, None
        if grad is not None:
            sink(entry, grad)

    return take
