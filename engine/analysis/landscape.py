"""The loss around a model and its random initialisation, along a line and in a plane (arXiv:2312.11875, Figure 2).

f(alpha, beta) = L(theta_0 + alpha delta_1 + beta delta_2), with theta_0 the random initialisation, theta_1 the model,
delta_1 = theta_1 - theta_0 and delta_2 = d * delta_1, d drawn once from a normal distribution, entry by entry.
"""

import math
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from transformers import PreTrainedModel

from engine.analysis.results import LandscapeResult
from engine.data.batches import Batch
from engine.evaluate import heldout_loss

ALPHAS = (-0.5, 1.5)  # as in the paper
BETAS = (-1.0, 1.0)


class Plane:
    """A model whose weights can be put anywhere in the plane; on leaving they are what they were, bit for bit.

    Holds three fp32 copies' worth beside the model: its own weights in their dtype, delta_1 and d. Tied weights once.
    """

    def __init__(self, model: PreTrainedModel, twin: PreTrainedModel, seed: int) -> None:
        """Take theta_1 from `model` and theta_0 from `twin`, which is not needed afterwards; `seed` draws d."""
        self._parameters = list(model.parameters())
        self._saved = [parameter.detach().clone() for parameter in self._parameters]
        random = [parameter.detach() for parameter in twin.parameters()]
        self._delta = [saved.float() - other.float() for saved, other in zip(self._saved, random, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self._d = [torch.randn(delta.shape, generator=generator).to(delta.device) for delta in self._delta]

    def __enter__(self) -> "Plane":
        """Nothing has moved yet."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Put the weights back."""
        self.restore()

    @torch.no_grad()
    def place(self, alpha: float, beta: float) -> None:
        """Put the weights at theta_1 + (alpha - 1 + beta d) delta_1: exactly theta_1 at (1, 0)."""
        for parameter, saved, delta, d in zip(self._parameters, self._saved, self._delta, self._d, strict=True):
            parameter.copy_(saved.float() + (alpha - 1 + beta * d) * delta)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model's own weights back."""
        for parameter, saved in zip(self._parameters, self._saved, strict=True):
            parameter.copy_(saved)


def measure_landscape(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    line: int,
    grid: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LandscapeResult:
    """Return the loss along the line and over the plane; the model has its own weights again afterwards.

    Args:
        model: theta_1, in evaluation mode.
        twin: theta_0, of the same configuration.
        batches: the loss is the mean over all their labelled tokens.
        line: points of the line, at least 2; alpha 0 and 1 are added where they are not among them.
        grid: points of each side of the plane, at least 2.
        seed: draws d.
        progress: told the points done and the points in all.
    """
    alphas = sorted({*spaced(*ALPHAS, line), 0.0, 1.0})
    plane_alphas, plane_betas = spaced(*ALPHAS, grid), spaced(*BETAS, grid)
    points = [(alpha, 0.0) for alpha in alphas] + [(alpha, beta) for beta in plane_betas for alpha in plane_alphas]
    losses: list[float | None] = []
    with Plane(model, twin, seed) as plane:
        for alpha, beta in points:
            plane.place(alpha, beta)
            loss = heldout_loss(model, batches, model.device)
            losses.append(loss if math.isfinite(loss) else None)
            progress(len(losses), len(points))
    rows = losses[len(alphas) :]
    return LandscapeResult(
        alphas=tuple(alphas),
        line=tuple(losses[: len(alphas)]),
        plane_alphas=tuple(plane_alphas),
        plane_betas=tuple(plane_betas),
        plane=tuple(tuple(rows[start : start + grid]) for start in range(0, len(rows), grid)),
        tokens=sum(batch.labelled_tokens for batch in batches),
    )


def spaced(low: float, high: float, count: int) -> list[float]:
    """Return `count` numbers from `low` to `high`, evenly spaced; rounded, so that 0 and 1 are themselves."""
    return [round(low + (high - low) * place / (count - 1), 9) for place in range(count)]
