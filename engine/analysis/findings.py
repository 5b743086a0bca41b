"""What the measured figures say: a table, one sentence computed from them, and plots, for each torch analysis."""

from statistics import fmean

from engine.analysis.figures import (
    batches_figure,
    histogram_figure,
    line_figure,
    normal_share,
    plane_figure,
    tensors_figure,
    top_figure,
)
from engine.analysis.results import Findings, GradientMeasure, GradientsResult, LandscapeResult, Plot

NEAR = 0.25  # how far around either end the oscillation of the loss is read


def gradient_findings(result: GradientsResult) -> Findings:
    """Say how concentrated the gradients are, and whether the first batch's choice lasts."""
    sides = {"pretrained": result.pretrained.overall, "random twin": result.twin.overall}
    shares = [share for share, _ in result.pretrained.overall.top]
    rows = [
        (
            f"top {100 * share:.2g} %",
            *(_percent(side.top[place][1]) for side in sides.values()),
            _percent(normal_share(share)),
        )
        for place, share in enumerate(shares)
        if share < 1
    ]
    rows.append(("largest |g|", *(f"{side.largest:.2g}" for side in sides.values()), ""))
    later = len(result.pretrained.overall.own) > 1
    if later:
        rows.append(("own top 1 %, later batches", *(_percent(_mean_later(s.own)) for s in sides.values()), ""))
        rows.append(("first batch's top 1 %", *(_percent(_mean_later(s.first)) for s in sides.values()), ""))
    names = list(result.pretrained.tensors)
    ones = {
        "pretrained": [top_percent(result.pretrained.tensors[name]) for name in names],
        "random twin": [top_percent(result.twin.tensors[name]) for name in names],
    }
    plots = (
        Plot(
            "Gradient entries by size", "First batch. Entries that are exactly 0 are left out.", histogram_figure(sides)
        ),
        Plot(
            "Held by the largest entries",
            "First batch; each weight keeps its own largest. Dotted: what normally distributed entries would give.",
            top_figure(sides),
        ),
        *(
            (Plot("Does the first choice last", "Solid: chosen anew in each batch.", batches_figure(sides)),)
            if later
            else ()
        ),
        Plot(
            "Weight by weight",
            "Share of the squared norm held by the top 1 %, first batch.",
            tensors_figure(names, ones),
        ),
    )
    columns = ("share of the squared norm", *sides, "normal")
    return Findings(columns, tuple(rows), _gradient_sentence(result), plots)


def top_percent(measure: GradientMeasure) -> float:
    """Return the share that the first batch's top 1 percent hold in the first batch."""
    return measure.own[0]


def _gradient_sentence(result: GradientsResult) -> str:
    model, twin = result.pretrained.overall, result.twin.overall
    more = top_percent(model) > top_percent(twin)
    text = (
        f"In the first batch the top 1 % of the entries hold {_percent(top_percent(model))} of the squared gradient "
        f"norm in the pretrained model and {_percent(top_percent(twin))} in its randomly initialised twin "
        f"(normally distributed entries: {_percent(normal_share(0.01))}): the pretrained gradient is "
        f"{'more' if more else 'not more'} concentrated"
    )
    if len(model.own) == 1:
        return f"{text}."
    kept = [_mean_later(side.first) / max(1e-12, _mean_later(side.own)) for side in (model, twin)]
    return (
        f"{text}; over {len(model.own) - 1} later batches the first batch's choice holds {_percent(kept[0])} of what "
        f"each batch's own would, in the twin {_percent(kept[1])}."
    )


def landscape_findings(result: LandscapeResult) -> Findings:
    """Say how the loss differs and oscillates around the random initialisation and around the model."""
    ends = {0.0: "random initialisation", 1.0: "model"}
    at = {alpha: dict(zip(result.alphas, result.line, strict=True))[alpha] for alpha in ends}
    along = {alpha: _range_near(result, alpha) for alpha in ends}
    across = {alpha: _range_around(result, alpha) for alpha in ends}
    rows = (
        ("loss there", *(_loss(at[alpha]) for alpha in ends)),
        (f"range within {NEAR} along the line", *(_loss(along[alpha]) for alpha in ends)),
        (f"range within {NEAR} in the plane", *(_loss(across[alpha]) for alpha in ends)),
    )
    known = [(loss, alpha) for alpha, loss in zip(result.alphas, result.line, strict=True) if loss is not None]
    highest = max((pair for pair in known if 0 <= pair[1] <= 1), default=(float("nan"), float("nan")))
    sentence = (
        f"The loss is {_loss(at[0.0])} nats per token at the random initialisation and {_loss(at[1.0])} at the model; "
        f"between them it is highest at alpha {highest[1]:.2f} ({highest[0]:.3f}), and within {NEAR} along the line it "
        f"varies by {_loss(along[0.0])} around the random initialisation and by {_loss(along[1.0])} around the model."
    )
    plots = (
        Plot("Along the line", "alpha 0: random initialisation; alpha 1: the model.", line_figure(result)),
        Plot(
            "In the plane",
            "Across: each entry of the difference times a number drawn once from a normal distribution. "
            "Losses beyond twice the median are cut.",
            plane_figure(result),
        ),
    )
    return Findings(("nats per token", *ends.values()), rows, sentence, plots)


def _range_near(result: LandscapeResult, end: float) -> float | None:
    near = [loss for alpha, loss in zip(result.alphas, result.line, strict=True) if abs(alpha - end) <= NEAR + 1e-9]
    return _spread(near)


def _range_around(result: LandscapeResult, end: float) -> float | None:
    return _spread(
        [
            loss
            for beta, row in zip(result.plane_betas, result.plane, strict=True)
            for alpha, loss in zip(result.plane_alphas, row, strict=True)
            if (alpha - end) ** 2 + beta**2 <= (NEAR + 1e-9) ** 2
        ]
    )


def _spread(losses: list[float | None]) -> float | None:
    """Return the range; None where there are fewer than two points, or one is not finite."""
    known = [loss for loss in losses if loss is not None]
    return max(known) - min(known) if len(known) == len(losses) > 1 else None


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _mean_later(shares: tuple[float, ...]) -> float:
    return fmean(shares[1:])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
