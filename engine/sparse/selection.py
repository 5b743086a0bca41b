"""Which entries of a weight are trained, and how much of a gradient they hold. Pure functions of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.targets import is_drawn_singly

EXACT_NUMEL = 2**16  # above this, a sample of as many gives a threshold
MOST_SAMPLED = 0.2  # of a larger share, a threshold leaves too many entries to be faster
_DRAWN_BELOW = 2**62  # 64 random bits a draw, by every version of PyTorch


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat positions in a tensor of `numel` entries: int32 below 2**31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def finite_flag(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether no entry of `tensors`, at least one, is NaN or infinite: a 0-dim bool that nobody looked at."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no entry of `tensors` is NaN or infinite; one look from the host for all of them."""
    return not tensors or bool(finite_flag(tensors))


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
    return largest_places(scores.flatten().abs(), count).sort().values.to(index_dtype(scores.numel()))


def largest_places(scores: Tensor, count: int) -> Tensor:
    """Return the places, (count,) int64, of the `count` largest entries of `scores`, (numel,) without NaN; unsorted.

    Exact. On the CPU a threshold from a sample leaves few entries for `topk`, which takes 16 bytes of each that it
    looks at: several times faster for a few percent of many. The sample's rank lies four deviations below what is
    wanted; where fewer entries than `count` are left all the same, `topk` looks at all of them.
    """
    numel = scores.numel()
    if scores.device.type == "cpu" and numel > EXACT_NUMEL and count <= MOST_SAMPLED * numel:
        sample = scores[:: numel // EXACT_NUMEL | 1]  # odd: a power of two would see the same columns of every row
        wanted = count * sample.numel() / numel
        threshold = sample.topk(min(sample.numel(), int(wanted + 4 * wanted**0.5 + 8))).values[-1]
        above = (scores >= threshold).nonzero().flatten()
        if above.numel() >= count:
            return above[scores[above].topk(count, sorted=False).indices]
    return scores.topk(count, sorted=False).indices


def select_random_indices(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` flat positions drawn without replacement: the papers' control.

    Of a large weight a permutation would take a second or more. There positions are drawn one by one, and again for
    those that were drawn before, until there are enough: the first `count` different ones of a sequence of draws, so
    that every set of them is as likely as any other. A remainder of 62 bits favours no position by more than
    numel / 2**62.

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
    if is_drawn_singly(numel, count):
        return _draw_singly(numel, count, generator)
    drawn = torch.randperm(numel, generator=generator)[:count]
    return drawn.sort().values.to(index_dtype(numel))


def _draw_singly(numel: int, count: int, generator: torch.Generator) -> Tensor:
    dtype = index_dtype(numel)
    found = torch.empty(0, dtype=dtype)
    while missing := count - found.numel():
        drawn = torch.randint(_DRAWN_BELOW, (missing,), generator=generator).remainder_(numel).to(dtype)
        found = torch.cat((drawn, found))
        del drawn  # what is sorted is then the most that a round takes, the same in each
        found = found.sort().values.unique_consecutive()
    return found


@dataclass
class _Kept:
    """Entries of one tensor that may be chosen: positions, what they rank by, what is remembered of them, (n,) each."""

    positions: Tensor
    ranks: Tensor
    payload: Tensor

    def only(self, mask: Tensor) -> "_Kept":
        return _Kept(self.positions[mask], self.ranks[mask], self.payload[mask])


class GlobalChoice:
    """The `count` entries of the largest scores over many tensors, found while these come one after another.

    One budget for all tensors, so that it goes to where the scores are (the redistribution that arXiv:2401.16405 leaves
    to future work). Exact; ties are broken arbitrarily. Each tensor keeps at least its best entry. Memory: up to
    2 `count` entries of 16 bytes, and what `torch.topk` takes.
    """

    def __init__(self, count: int) -> None:
        """Choose `count` entries, at least one a tensor that will come."""
        self._count = count
        self._threshold = float("-inf")
        self._kept: dict[str, _Kept] = {}

    def add(self, name: str, scores: Tensor, payload: Tensor) -> None:
        """Take in a tensor.

        Args:
            name: of the tensor.
            scores: any shape; larger is better.
            payload: of the same shape; what is wanted of the chosen entries.

        Raises:
            ValueError: `scores` contains NaN.
        """
        if torch.isnan(scores).any():
            raise ValueError("scores contain NaN")
        ranks = scores.flatten().float()
        best = int(ranks.argmax())
        positions = (ranks > self._threshold).nonzero().flatten()
        if positions.numel() > self._count:
            positions = ranks.topk(self._count, sorted=False).indices
        if not bool((positions == best).any()):
            positions = torch.cat((positions, positions.new_tensor([best])))
        kept = _Kept(positions.to(index_dtype(ranks.numel())), ranks[positions], payload.flatten()[positions])
        kept.ranks[positions == best] = float("inf")
        self._kept[name] = kept
        if sum(each.ranks.numel() for each in self._kept.values()) > 2 * self._count:
            joined = torch.cat([each.ranks for each in self._kept.values()])
            # Not sorted: a GPU would take as much again several times over to sort what is looked at once.
            self._threshold = float(joined.topk(self._count, sorted=False).values.min())
            del joined
            self._kept = {name: each.only(each.ranks >= self._threshold) for name, each in self._kept.items()}

    def result(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each tensor its chosen positions, (n,) sorted and unique, int32 or int64, and their payload."""
        ranks = torch.cat([each.ranks for each in self._kept.values()])
        chosen = torch.zeros(ranks.numel(), dtype=torch.bool, device=ranks.device)
        chosen[ranks.topk(min(self._count, ranks.numel()), sorted=False).indices] = True
        found = {}
        masks = chosen.split([each.ranks.numel() for each in self._kept.values()])
        for (name, each), mask in zip(self._kept.items(), masks, strict=True):
            positions, order = each.positions[mask].sort()
            found[name] = positions, each.payload[mask][order]
        return found


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
