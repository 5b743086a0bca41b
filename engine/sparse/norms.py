"""Frozen norms (RMSNorm) whose output is made again in the backward, and whose gradient comes by its formula.

Operation by operation a norm of 16-bit numbers goes over its input some eight times, half of them in fp32; on a GPU,
where memory is what they wait for, each part is compiled to one kernel. Casts are kept where they are, so that it gives
the bits of the plain form up to the order of a row's sum.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.sparse.compiling import Compiled

_KEPT_CASTS: dict[str, Any] = {"options": {"emulate_precision_casts": True}}


def normed(x: Tensor, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
    """Return the norm of x, (..., width), and the reciprocal roots, (..., 1) in fp32; see `FrozenNorm`."""
    root = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return scaled(x, root, weight, wide), root


def scaled(x: Tensor, root: Tensor, weight: Tensor, wide: bool) -> Tensor:
    """Return the norm of x, (..., width), from its reciprocal roots."""
    if wide:
        return ((x.float() * root) * (1.0 + weight.float())).to(x.dtype)
    return weight * (x.float() * root).to(x.dtype)


def norm_gradient(grad_y: Tensor, x: Tensor, root: Tensor, weight: Tensor, wide: bool) -> Tensor:
    """Return dL/dx = r (h - n mean(h n)), with n = x r and h = dL/dy weight, in the dtype of x."""
    inner = grad_y.float() * (1.0 + weight.float()) if wide else (grad_y * weight).float()
    unit = x.float() * root
    share = (inner * unit).mean(-1, keepdim=True)
    return inner.addcmul_(unit, share, value=-1).mul_(root).to(x.dtype)


NORMED = Compiled(normed, "The norm of activations", **_KEPT_CASTS)
SCALED = Compiled(scaled, "The norm of activations", **_KEPT_CASTS)
GRADIENT = Compiled(norm_gradient, "The gradient of a norm", **_KEPT_CASTS)


class FrozenNorm(NamedTuple):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, as Llama's and Gemma's norms compute it.

    Both in fp32; Llama's rounds to the dtype of x before it scales, Gemma's (`wide`) after it scaled by 1 + weight.
    """

    weight: Tensor  # (width,)
    eps: float
    wide: bool

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y from x, (..., width), and the reciprocal roots, (..., 1) in fp32."""
        return (NORMED if x.is_cuda else normed)(x, self.weight, self.eps, self.wide)

    def scale(self, x: Tensor, root: Tensor) -> Tensor:
        """Return y from x and its reciprocal roots."""
        return (SCALED if x.is_cuda else scaled)(x, root, self.weight, self.wide)

    def gradient(self, grad_y: Tensor, x: Tensor, root: Tensor) -> Tensor:
        """Return dL/dx."""
        return (GRADIENT if x.is_cuda else norm_gradient)(grad_y, x, root, self.weight, self.wide)


class Norm(torch.autograd.Function):
    """A frozen norm that keeps its input and the reciprocal roots, and whose output can be made again of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
        """Return y and the reciprocal roots."""
        y, root = norm.begin(x)
        ctx.save_for_backward(x, root)
        ctx.norm = norm
        ctx.mark_non_differentiable(root)
        return y, root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        norm: FrozenNorm = ctx.norm
        return norm.gradient(grads[0], *ctx.saved_tensors), None
