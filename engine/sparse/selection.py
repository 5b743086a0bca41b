"""Which entries of a weight are trained, and how much of a gradient they hold. Pure functions of tensors."""

import torch
from torch import Tensor

EXACT_NUMEL = 2**20  # above this, shares are read off a threshold that a sample gives
SAMPLE_NUMEL = 2**18


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat positions in a tensor of `numel` entries: int32 below 2**31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def select_topk_indices(scores: Tensor, count: int) -> Tensor:
    """Return the flat positions of the `count` largest entries of |scores|.

    SIFT chooses the trained weights this way from the first gradients
    (arXiv:2312.11875). Ties are broken arbitrarily.

    Args:
        scores: any shape and float dtype.
        count: positions to return, 1 <= count <= scores.numel().

    Returns:
        (count,) sorted and unique; int32 if scores.numel() < 2**31, else int64.
        Extra memory: one copy of `scores`, and 8 bytes an entry returned.

    Raises:
        ValueError: `count` is out of range, or `scores` contains NaN.
    """
    if not 1 <= count <= scores.numel():
        raise ValueError(f"count must be in [1, {scores.numel()}], got {count}")
    if torch.isnan(scores).any():
        raise ValueError("scores contain NaN")
    top = scores.flatten().abs().topk(count, sorted=False).indices
    return top.sort().values.to(index_dtype(scores.numel()))


def select_random_indices(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` flat positions drawn without replacement: the papers' control.

    Args:
        numel: entries of the weight.
        count: positions to return, 1 <= count <= numel.
        generator: on the CPU, so that every device draws the same.

    Returns:
        (count,) on the CPU, sorted and unique; int32 if numel < 2**31, else int64.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 1 <= count <= numel:
        raise ValueError(f"count must be in [1, {numel}], got {count}")
    drawn = torch.randperm(numel, generator=generator)[:count]
    return drawn.sort().values.to(index_dtype(numel))


def squared_norm(grad: Tensor) -> float:
    """Return the sum of the squares of all entries, accumulated in at least fp32."""
    return float(grad.to(_at_least_fp32(grad)).square().sum())


def squared_norm_of_top(grad: Tensor, count: int) -> float:
    """Return the sum of the squares of the `count` largest entries of |grad|.

    Exact up to `EXACT_NUMEL` entries. Above, the threshold comes from a strided sample of `SAMPLE_NUMEL` entries and
    the sum is scaled to `count` entries: two passes instead of a sort, off by about one percent at density 1 percent.
    """
    flat = grad.flatten().to(_at_least_fp32(grad)).square()
    if flat.numel() <= EXACT_NUMEL:
        return float(flat.topk(count, sorted=False).values.sum())
    sample = flat[:: flat.numel() // SAMPLE_NUMEL]
    rank = max(1, round(sample.numel() * count / flat.numel()))
    above = flat[flat >= sample.topk(rank, sorted=False).values.min()]
    return float(above.sum()) * min(1.0, count / max(1, above.numel()))


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
