"""Blocks that keep for the backward only what costs a matrix product to make again (`engine.planner.recompute`).

A block of a Llama keeps, per token of width d and f in the MLP, its input, q, k, v, the attention's output, the input
of the second norm, gate and up: 6 d + 2 f numbers. Norm outputs and the gated product, 2 d + 2 f more and in 16 bit
fp32 copies besides, are made again where the gradient of a weight asks for them. With `mlp` gate and up are not kept
either.

The modules' forwards are replaced as in `linear.py`; what is computed is the same, the gradient of the norm by its
formula instead of operation by operation: equal to the rounding of fp32.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.planner.recompute import Kept, kept_by_block
from engine.sparse.norms import FrozenNorm, Norm
from engine.sparse.recipes import Recipe, Tensors, give_recipe, read_back, recipe_of
from engine.spec import RunSpec
from engine.targets import layer_number


class _Graph(NamedTuple):
    """From its leaves to its end, which need not be there any more."""

    leaves: Tensors
    end: GradientEdge


class _Combined:
    """y = combine(*parts), element by element, made again once in a backward for two who want it.

    Who reads y comes first, then the gradients of the parts. The graph that the first makes serves the second.
    """

    def __init__(self, combine: Callable[..., Tensor], *, shared: bool) -> None:
        """Hold no graph yet; `shared`: whether the gradients of the parts will be asked for."""
        self._combine, self._shared = combine, shared
        self._graph: _Graph | None = None

    def result(self, *parts: Tensor) -> Tensors:
        """Return y, without a graph."""
        if not self._shared:
            return (self._combine(*parts),)
        y, self._graph = self._follow(parts)
        return (y,)

    def gradients(self, grad_y: Tensor, parts: Tensors) -> Tensors:
        """Return the gradients of the parts; where nobody read y, of a graph made for them alone."""
        graph, self._graph = self._graph or self._follow(parts)[1], None
        return torch.autograd.grad(graph.end, graph.leaves, grad_y)

    def _follow(self, parts: Tensors) -> tuple[Tensor, _Graph]:
        leaves = tuple(part.detach().requires_grad_() for part in parts)
        with torch.enable_grad():
            y = self._combine(*leaves)
        return y.detach(), _Graph(leaves, get_gradient_edge(y))


class _Elementwise(torch.autograd.Function):
    """y = combine(*parts): keeps what the parts can be had from, and nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, combine: Callable[..., Tensor], combined: _Combined, recipe: Recipe, *parts: Tensor
    ) -> Tensor:
        """Return y; `recipe`: of the parts."""
        ctx.save_for_backward(*recipe.inputs)
        ctx.again, ctx.combined = recipe.again, combined
        return combine(*parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parts."""
        parts = read_back(ctx.again, ctx.saved_tensors)
        return None, None, None, *ctx.combined.gradients(grads[0], parts)


class _Mlp(NamedTuple):
    """The parts of an MLP: `firsts` read its input, `combine` makes of their results what `last` reads."""

    firsts: tuple[nn.Module, ...]
    combine: Callable[..., Tensor]
    last: nn.Module


class RecomputedBlocks:
    """Norms and MLPs of blocks with forwards of their own, until `remove`."""

    def __init__(self, model: nn.Module, kept: Sequence[Kept], trained: Collection[str]) -> None:
        """Replace the forwards of the blocks that keep little.

        Args:
            model: of one of `KNOWN_FAMILIES`; the forwards of its linear layers are replaced already.
            kept: what each block keeps.
            trained: names of the trained weights; norms among them keep their own forward.
        """
        self._modules: list[nn.Module] = []
        for name, module in model.named_modules():
            layer = layer_number(f"{name}.weight")
            if layer is None or layer >= len(kept) or not kept[layer].lean:
                continue
            if f"{name}.weight" not in trained and (norm := _norm_forward(module)):
                self._put(module, norm)
            elif mlp := _mlp_of(module):
                self._put(module, _mlp_forward(mlp, gates=kept[layer].gates))

    def _put(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        module.forward = forward
        self._modules.append(module)

    def remove(self) -> None:
        """Give the modules their own forward back."""
        for module in self._modules:
            del module.forward


def kept_by_model(spec: RunSpec, model: Any) -> tuple[Kept, ...]:
    """Return what each block of a model keeps in a run of `spec`; nothing for a model of another kind."""
    config = getattr(model, "config", None)
    blocks = getattr(config, "num_hidden_layers", 0)
    return kept_by_block(spec, getattr(config, "model_type", ""), blocks)


def _norm_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of a norm whose output carries a recipe; None for any other module."""
    if type(module) is nn.LayerNorm:
        own = module.forward

        def forward(x: Tensor) -> Tensor:
            y = own(x)  # the kernel keeps x itself
            give_recipe(Recipe((x,)).then(lambda x: (own(x),)), y)
            return y

        return forward
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    wide = type(module).__name__.startswith("Gemma")
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    norm = FrozenNorm(module.weight, eps, wide)

    def scaled(x: Tensor) -> Tensor:
        y: Tensor
        y, root = Norm.apply(x, norm)  # type: ignore[no-untyped-call]
        give_recipe(Recipe((x, root)).then(lambda x, root: (norm.scale(x, root),)), y)
        return y

    return scaled


def _mlp_of(module: Any) -> _Mlp | None:
    """Return the parts of the MLP of a Llama, Gemma, Phi or Phi 3; None for any other module."""
    names = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= names:
        act = module.act_fn
        return _Mlp((module.gate_proj, module.up_proj), lambda gate, up: act(gate) * up, module.down_proj)
    if {"gate_up_proj", "down_proj", "activation_fn"} <= names:
        return _Mlp((module.gate_up_proj,), _fused_gate(module.activation_fn), module.down_proj)
    if {"fc1", "fc2", "activation_fn"} <= names:
        return _Mlp((module.fc1,), module.activation_fn, module.fc2)
    return None


def _fused_gate(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def combine(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * act(gate)

    return combine


def _mlp_forward(mlp: _Mlp, *, gates: bool) -> Callable[[Tensor], Tensor]:
    """Return the forward of an MLP; without `gates` what its first layers give is made again of their input."""

    def firsts(h: Tensor) -> Tensors:
        return tuple(first(h) for first in mlp.firsts)

    def forward(h: Tensor) -> Tensor:
        parts = firsts(h)
        if not gates:
            give_recipe(recipe_of(h).then(firsts), *parts)
        recipe = recipe_of(*parts)
        combined = _Combined(mlp.combine, shared=any(part.requires_grad for part in parts))
        y: Tensor = _Elementwise.apply(mlp.combine, combined, recipe.reading(), *parts)  # type: ignore[no-untyped-call]
        give_recipe(recipe.then(combined.result), y)
        found: Tensor = mlp.last(y)
        return found

    return forward
