"""How concentrated the gradients of a model are, batch by batch (arXiv:2312.11875, Figures 3 and 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.analysis.results import (
    BINS_PER_DECADE,
    HIGHEST_DECADE,
    LOWEST_DECADE,
    GradientMeasure,
    ModelGradients,
)
from engine.data.batches import Batch
from engine.evaluate import causal_loss
from engine.sparse.base_weight import base_weights
from engine.sparse.entries import ActiveEntries
from engine.sparse.hooks import GradientHooks
from engine.sparse.selection import select_topk_indices
from engine.targets import match_targets, num_active_of

TOP_FRACTION = 0.01  # Figure 4: the top 1 percent
SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def log_histogram(grad: Tensor) -> list[int]:
    """Return how many entries of `grad` have their |g| in each bin of `results`; exact zeros are in none."""
    magnitude = grad.flatten().float().abs()
    magnitude = magnitude[magnitude > 0]
    bins = BINS_PER_DECADE * (HIGHEST_DECADE - LOWEST_DECADE)
    places = ((magnitude.log10() - LOWEST_DECADE) * BINS_PER_DECADE).floor().long().clamp(0, bins - 1)
    counted: list[int] = torch.bincount(places, minlength=bins).tolist()
    return counted


def norms_of_top(squares: Tensor, counts: Sequence[int]) -> list[float]:
    """Return the sum of the largest entries of `squares` for each of the growing `counts`, summed in fp64."""
    ordered = squares.sort(descending=True).values
    sums, done, total = [], 0, 0.0
    for count in counts:
        total += float(ordered[done:count].sum(dtype=torch.float64))
        sums.append(total)
        done = count
    return sums


@dataclass
class _Sums:
    """What is known of the gradients of one weight; squared norms are sums, so that weights can be added up."""

    numel: int
    zeros: int = 0
    largest: float = 0.0
    histogram: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    top: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)  # of each batch
    first: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def measure(self) -> GradientMeasure:
        """Return the sums as shares."""
        points = {
            count / self.numel: _share(norm, self.total[0]) for count, norm in zip(self.counts, self.top, strict=True)
        }
        return GradientMeasure(
            numel=self.numel,
            zeros=self.zeros,
            largest=self.largest,
            histogram=tuple(self.histogram),
            top=tuple(points.items()),
            first=tuple(_share(norm, total) for norm, total in zip(self.first, self.total, strict=True)),
            own=tuple(_share(norm, total) for norm, total in zip(self.own, self.total, strict=True)),
        )


def _share(norm: float, total: float) -> float:
    return min(1.0, norm / total) if total else 0.0


def _added(parts: Sequence[_Sums]) -> _Sums:
    def columns(name: str) -> list[float]:
        return [sum(column) for column in zip(*(getattr(part, name) for part in parts), strict=True)]

    return _Sums(
        sum(part.numel for part in parts),
        sum(part.zeros for part in parts),
        max(part.largest for part in parts),
        [int(count) for count in columns("histogram")],
        [int(count) for count in columns("counts")],
        *(columns(name) for name in ("top", "total", "first", "own")),
    )


class GradientMeter:
    """Takes in the dense gradients of batch after batch, one weight at a time; the first batch chooses.

    A weight that the first batch does not reach (an expert) is left out; a later batch that does not reach one of the
    others counts as a gradient of zero.
    """

    def __init__(self) -> None:
        """Begin with the first batch."""
        self._sums: dict[str, _Sums] = {}
        self._batches = 0

    def observe(self, entry: ActiveEntries, grad: Tensor) -> None:
        """Take in the dense gradient of one weight in one batch; `entry` has room for the top 1 percent."""
        if self._batches and entry.name not in self._sums:
            return
        squares = grad.flatten().float().square()
        sums = self._sums.setdefault(entry.name, _Sums(grad.numel()))
        if not entry.is_placed:
            entry.place(select_topk_indices(grad, entry.num_active))
            sums.zeros = grad.numel() - int(grad.count_nonzero())
            sums.largest = float(grad.abs().max())
            sums.histogram = log_histogram(grad)
            sums.counts = [max(1, int(share * grad.numel())) for share in SHARES]
            sums.top = norms_of_top(squares, sums.counts)
        sums.total.append(float(squares.sum(dtype=torch.float64)))
        sums.first.append(float(squares.index_select(0, entry.placed).sum(dtype=torch.float64)))
        sums.own.append(float(squares.topk(entry.num_active, sorted=False).values.sum(dtype=torch.float64)))

    def end_batch(self) -> None:
        """Say that the backward of a batch is over."""
        self._batches += 1
        for sums in self._sums.values():
            if len(sums.total) < self._batches:
                for norms in (sums.total, sums.first, sums.own):
                    norms.append(0.0)

    def result(self) -> ModelGradients:
        """Return the shares of all batches so far."""
        # A backward comes to the last layer first.
        tensors = {name: sums.measure() for name, sums in reversed(self._sums.items())}
        return ModelGradients(_added(list(self._sums.values())).measure(), tensors)


def measure_gradients(
    model: PreTrainedModel,
    targets: str | tuple[str, ...],
    batches: Sequence[Batch],
    progress: Callable[[int], None] = lambda _done: None,
) -> ModelGradients:
    """Return what the gradients of the targets look like over `batches`, each of its mean loss per labelled token.

    One dense gradient is alive at a time; the first batch also sorts a copy of it. The model is left without gradients.

    Args:
        model: dense weights, in evaluation mode.
        targets: as in a spec.
        batches: at least one; the first one chooses.
        progress: told the batches done.

    Raises:
        TargetsError: no weight matches `targets`.
    """
    weights = {name: weight for name, weight in base_weights(model).items() if isinstance(weight, nn.Parameter)}
    names = match_targets({name: tuple(weight.shape) for name, weight in weights.items()}, targets)
    counts = num_active_of({name: weights[name].numel() for name in names}, TOP_FRACTION)
    model.requires_grad_(False)
    meter = GradientMeter()
    hooks = GradientHooks([ActiveEntries(name, weights[name], count) for name, count in counts.items()], meter.observe)
    try:
        for done, batch in enumerate(batches, 1):
            causal_loss(model, batch, max(1, batch.labelled_tokens), model.device).backward()
            meter.end_batch()
            progress(done)
    finally:
        hooks.remove()
        model.requires_grad_(False)
    return meter.result()
