"""The gradient by a function: linear layers whose dense gradient never leaves the backward.

The only way for NF4 weights, which cannot require a gradient; for dense linear layers the same numbers as the hooks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.sparse.base_weight import NF4Weight
from engine.sparse.entries import ActiveEntries

GradientSink = Callable[[ActiveEntries, Tensor], None]


def rebuild_weight(entry: ActiveEntries, dtype: torch.dtype) -> Tensor:
    """Return W + D, (out_features, in_features), in `dtype`.

    A dense weight holds its delta already and is returned itself. An NF4 weight is dequantised and the values are added
    in their own precision; the result lives only as long as the caller keeps it.
    """
    if not isinstance(entry.weight, NF4Weight):
        return entry.weight.detach()
    dense = entry.weight.dense().to(dtype)
    if entry.applied:
        changes = [(entry.placed, entry.values.detach())]
        if entry.settled is not None:
            changes.append((entry.settled.indices, entry.settled.values))
        flat = dense.view(-1)
        for indices, values in changes:
            positions = indices.long()
            flat.index_copy_(0, positions, (flat.index_select(0, positions).to(values.dtype) + values).to(dtype))
    return dense


class SparseDeltaLinear(torch.autograd.Function):
    """y = x @ (W + D).T + b, W and b frozen, D nonzero only at the entries.

    Forward:   y    = x @ (W + D).T + b        (..., in) -> (..., out)
    Backward:  dL/dx = g @ (W + D)             g = dL/dy, (..., out)
               the dense g.T @ x, (out, in), is handed to `sink` and freed: it takes the entries' gradient.

    `values` is an argument only so that the backward runs where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _values: Tensor, bias: Tensor | None, entry: ActiveEntries, sink: GradientSink | None
    ) -> Tensor:
        """Multiply; keeps x alone for the backward."""
        ctx.save_for_backward(x)
        ctx.entry, ctx.sink = entry, sink
        return functional.linear(x, rebuild_weight(entry, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Return the gradient of x; hand the dense gradient of the weight to the sink."""
        (grad_y,), (x,) = grads, ctx.saved_tensors
        grad_x = grad_y @ rebuild_weight(ctx.entry, x.dtype) if ctx.needs_input_grad[0] else None
        if ctx.sink is not None:
            ctx.sink(ctx.entry, grad_y.flatten(0, -2).T @ x.flatten(0, -2))
        return grad_x, None, None, None, None


class LinearFunctions:
    """The forward of linear layers replaced by `SparseDeltaLinear`, until `remove`."""

    def __init__(self, model: nn.Module, entries: Iterable[ActiveEntries], sink: GradientSink | None = None) -> None:
        """Replace the forward of the layers that hold the weights of `entries`.

        Args:
            model: whose modules are looked up by the names of the entries.
            entries: weights of linear layers, dense or NF4.
            sink: called in the backward with the entries and the dense gradient, (out, in) in the dtype of x; None
                where nothing is trained.
        """
        self._modules = []
        for entry in entries:
            module = model.get_submodule(entry.name.removesuffix(".weight"))
            module.forward = _forward(module, entry, sink)
            self._modules.append(module)

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for module in self._modules:
            del module.forward


def _forward(module: nn.Module, entry: ActiveEntries, sink: GradientSink | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        y: Tensor = SparseDeltaLinear.apply(x, entry.values, bias, entry, sink)  # type: ignore[no-untyped-call]
        return y

    return forward
