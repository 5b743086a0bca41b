"""Which entries of a weight are trained, and how much of a gradient they hold. Pure functions of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

EXACT_NUMEL = 2**16  # above this, shares are read off a threshold that a sample gives


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


def squared_norms_of_top(squares: Tensor, counts: Sequence[int]) -> list[float]:
    """Return, for each count, the sum of that many largest entries of `squares`.

    Exact up to `EXACT_NUMEL` entries. Above, the threshold of each count comes from a strided sample of about as many
    entries, and one pass sums what is not below it: off by a percent or less, and many times faster than a sort.

    Args:
        squares: (numel,) squared gradient entries, at least fp32.
        counts: each in [1, numel].
    """
    sample = squares[:: max(1, squares.numel() // EXACT_NUMEL)]
    share = sample.numel() / squares.numel()
    ranks = [max(1, round(count * share)) for count in counts]
    largest = sample.topk(max(ranks)).values
    if share == 1.0:
        return [float(largest[:rank].sum()) for rank in ranks]
    return [_sum_of_top(squares, count, largest[rank - 1]) for count, rank in zip(counts, ranks, strict=True)]


def _sum_of_top(squares: Tensor, count: int, threshold: Tensor) -> float:
    above = squares >= threshold
    # The threshold lets a few too many or too few through; those are about as large as the threshold.
    missing = count - int(above.sum())
    return float(torch.where(above, squares, 0.0).sum() + missing * threshold)
