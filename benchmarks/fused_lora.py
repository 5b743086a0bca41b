"""A LoRA layer as fast as plain torch allows, for a fair comparison; no part of the product.

y = x W.T + s (x A.T) B.T with W frozen. Kept for the backward: x and x A.T. All products that can add to another do.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _FusedLora(torch.autograd.Function):
    """dx = g W + s (g B) A,  dA = s (g B).T x,  dB = s g.T (x A.T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """x: (tokens, in), weight: (out, in), down: (rank, in), up: (out, rank)."""
        narrow = x @ down.T
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scale = scale
        return (x @ weight.T).addmm_(narrow, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """Return the gradients of x, A and B."""
        (grad_y,), (x, weight, down, up, narrow) = grads, ctx.saved_tensors
        grad_narrow = (grad_y @ up).mul_(ctx.scale)
        grad_x = (grad_y @ weight).addmm_(grad_narrow, down)
        return grad_x, None, grad_narrow.T @ x, (grad_y.T @ narrow).mul_(ctx.scale), None


class FusedLora(nn.Module):
    """A linear layer without bias and the two matrices beside it."""

    def __init__(self, inner: nn.Linear, rank: int, scale: float = 2.0) -> None:
        """Stand beside `inner`, whose weight stays frozen."""
        super().__init__()
        weight = inner.weight
        self.weight, self._scale = weight, scale
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x of any number of leading dimensions."""
        y: Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), self.weight, self.down, self.up, self._scale
        )
        return y.view(*x.shape[:-1], -1)


def add_fused_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put a `FusedLora` in the stead of every linear layer of the blocks; return what is trained."""
    trained: list[nn.Parameter] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            lora = FusedLora(module, rank)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, lora)
            trained += [lora.down, lora.up]
    return trained
