"""The gradient by a function: linear layers whose weight is outside the graph, and whose dense gradient need not be.

The only way for NF4 weights, which cannot require a gradient; for dense linear layers the same numbers as the hooks,
mostly for less work: where only a few entries of the gradient are wanted, only those are computed (`gradient_ways.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dis import Instruction, get_instructions
from functools import lru_cache
from inspect import isfunction, unwrap
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.sparse.base_weight import NF4Weight
from engine.sparse.entries import ActiveEntries
from engine.sparse.kernels import Change, rebuild_nf4
from engine.sparse.recipes import Recipe, read_back, recipe_of


class FactorSink(Protocol):
    """Where the backward of a linear layer leaves what the gradient of its weight is made of."""

    def __call__(self, entry: ActiveEntries, grad_y: Tensor, x: Tensor) -> None:
        """Take what is wanted of grad_y.T @ x: grad_y (tokens, out), x (tokens, in), both freed afterwards."""


def rebuild_weight(entry: ActiveEntries, dtype: torch.dtype) -> Tensor:
    """Return W + D, (out_features, in_features), in `dtype`.

    A dense weight holds its delta already and is returned itself, in another dtype a copy. An NF4 weight is dequantised
    and the values are added in their own precision; the result lives only as long as the caller keeps it.
    """
    if not isinstance(entry.weight, NF4Weight):
        return entry.weight.detach().to(dtype)
    changes: list[Change] = []
    if entry.applied:
        changes.append((entry.positions, entry.values.detach()))
        if entry.settled is not None:
            changes.append((entry.settled.positions, entry.settled.values))
    return rebuild_nf4(entry.weight, changes, dtype)


class SparseDeltaLinear(torch.autograd.Function):
    """y = x @ (W + D).T + b, W frozen, D nonzero only at the entries.

    Forward:   y    = x @ (W + D).T + b        (..., in) -> (..., out)
    Backward:  dL/dx = g @ (W + D)             g = dL/dy, (..., out)
               dL/db = sum of g over tokens    where b requires a gradient
               g and x, whose product is the dense gradient, are handed to `sink`: it takes the entries' gradient.

    `values` is an argument only so that the backward runs where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _values: Tensor,
        bias: Tensor | None,
        entry: ActiveEntries,
        sink: FactorSink | None,
        recipe: Recipe,
    ) -> Tensor:
        """Multiply; keeps x alone for the backward, or what `recipe` makes it of."""
        ctx.save_for_backward(*recipe.inputs)
        ctx.entry, ctx.sink, ctx.again = entry, sink, recipe.again
        y = functional.linear(x, rebuild_weight(entry, x.dtype), bias)
        # A view made in a function of one's own could not be changed in place, as some families do with their queries.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        """Return the gradients of x and the bias; hand the factors of the weight's gradient to the sink."""
        (grad_y,) = grads
        grad_x = grad_y @ rebuild_weight(ctx.entry, grad_y.dtype) if ctx.needs_input_grad[0] else None
        flat = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.sink is not None:
            (x,) = read_back(ctx.again, ctx.saved_tensors)
            ctx.sink(ctx.entry, flat, x.reshape(-1, x.shape[-1]))
        return grad_x, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None, None, None


class LinearFunctions:
    """The forward of linear layers replaced by `SparseDeltaLinear`, until `remove`."""

    def __init__(self, model: nn.Module, entries: Iterable[ActiveEntries], sink: FactorSink | None = None) -> None:
        """Replace the forward of the layers that hold the weights of `entries`.

        Args:
            model: whose modules are looked up by the names of the entries.
            entries: weights of linear layers, dense or NF4.
            sink: called in the backward; None where nothing is trained.
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


def plain_linear_weights(model: nn.Module, entries: Sequence[ActiveEntries]) -> list[ActiveEntries]:
    """Return those of `entries` that `LinearFunctions` can train: NF4 weights, and those of plain linear layers.

    A weight that several layers share or that a method of the module around it reads itself, a subclass with a forward
    of its own, or a layer whose forward was replaced is left to the hooks, which work wherever a weight is used.
    """
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    found = []
    for entry in entries:
        layer = entry.name.rpartition(".")[0]
        module, around = model.get_submodule(layer), model.get_submodule(layer.rpartition(".")[0])
        plain = type(module) is nn.Linear and entry.weight is module.weight and "forward" not in vars(module)
        plain = plain and layer.rpartition(".")[2] not in _layers_read_by(type(around))  # type: ignore[arg-type]
        if isinstance(entry.weight, NF4Weight) or (plain and users[id(entry.weight)] == 1):
            found.append(entry)
    return found


@lru_cache(maxsize=256)
def _layers_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Return the layers whose `weight` a module of this class reads itself, `self.dt_proj.weight`, by its code.

    Such a layer's forward may never run: Mamba's mixer multiplies with the weight of `dt_proj`.
    """
    found = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method in vars(owner).values():
            if isfunction(method):
                steps = pairwise(get_instructions(unwrap(method)))
                found |= {layer.argval for layer, part in steps if part.argval == "weight" and _are_read(layer, part)}
    return frozenset(found)


def _are_read(*steps: Instruction) -> bool:
    return all(step.opname == "LOAD_ATTR" for step in steps)


def _forward(module: nn.Module, entry: ActiveEntries, sink: FactorSink | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        kind = x.device.type
        available = torch.amp.is_autocast_available(kind)
        if available and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))  # so that the backward, where autocast is off, has one dtype
        recipe = recipe_of(x) if sink is None else recipe_of(x).reading()
        y: Tensor = SparseDeltaLinear.apply(x, entry.values, bias, entry, sink, recipe)  # type: ignore[no-untyped-call]
        return y

    return forward
