"""What the analyses measure, and what they say, as plain data: workers write it, the command line reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["gradients", "landscape", "ages", "density", "modules", "schedule"]
TITLES: dict[Kind, str] = {
    "gradients": "How concentrated the gradient is",
    "landscape": "The loss between random weights and the model",
    "ages": "When the trained entries were chosen",
    "density": "Methods over the number of trained values",
    "modules": "Which weights to train",
    "schedule": "When and how much SpIEL replaces",
}
# Entries by |g| are counted in bins of a quarter decade: from 10^-14 to 10^2, and what lies beyond in the outer two.
LOWEST_DECADE, HIGHEST_DECADE, BINS_PER_DECADE = -14, 2, 4


@dataclass(frozen=True)
class GradientMeasure:
    """The gradients of one weight, or of all of them together.

    `numel`: entries; `zeros`: those of the first batch that are exactly 0; `largest`: the largest |g| of it.
    `histogram`: the others by |g|. `top`: pairs (share of the entries, share of the squared norm that the largest so
    many hold), of the first batch. `first`, `own`: for each batch, the share of its squared norm held by the first
    batch's top 1 percent, and by its own.
    """

    numel: int
    zeros: int
    largest: float
    histogram: tuple[int, ...]
    top: tuple[tuple[float, float], ...]
    first: tuple[float, ...]
    own: tuple[float, ...]


@dataclass(frozen=True)
class ModelGradients:
    """The gradients of one model: of all targets together (each keeps its own largest), and of each by name."""

    overall: GradientMeasure
    tensors: dict[str, GradientMeasure]


@dataclass(frozen=True)
class GradientsResult:
    """The gradients of the pretrained model, and of its randomly initialised twin on the same batches."""

    pretrained: ModelGradients
    twin: ModelGradients


@dataclass(frozen=True)
class LandscapeResult:
    """The loss per labelled token at theta_0 + alpha (theta_1 - theta_0) + beta delta_2; None where it is not finite.

    `line[i]` is at `alphas[i]` and beta 0; `plane[j][i]` at `plane_alphas[i]` and `plane_betas[j]`.
    """

    alphas: tuple[float, ...]
    line: tuple[float | None, ...]
    plane_alphas: tuple[float, ...]
    plane_betas: tuple[float, ...]
    plane: tuple[tuple[float | None, ...], ...]
    tokens: int


@dataclass(frozen=True)
class Plot:
    """One plot: a heading, a caption that says how to read it, and the figure as plotly's JSON."""

    heading: str
    caption: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What an analysis says: a short table, one sentence computed from the figures, and plots."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sentence: str
    plots: tuple[Plot, ...] = field(default=())


def read_gradients(body: Mapping[str, Any]) -> GradientsResult:
    """Return the result whose `asdict` went through JSON."""

    def measure(item: Mapping[str, Any]) -> GradientMeasure:
        return GradientMeasure(**{**item, "top": tuple((share, held) for share, held in item["top"])})

    def model(item: Mapping[str, Any]) -> ModelGradients:
        tensors = {name: measure(tensor) for name, tensor in item["tensors"].items()}
        return ModelGradients(measure(item["overall"]), tensors)

    return GradientsResult(model(body["pretrained"]), model(body["twin"]))
