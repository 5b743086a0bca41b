"""From results to plots: figures as plotly's JSON, so that this module needs no plotly."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engine.analysis.look import AXIS, BLUE, CORAL, GREY, PALETTE, layout
from engine.analysis.results import BINS_PER_DECADE, LOWEST_DECADE, GradientMeasure, LandscapeResult

Figure = dict[str, Any]
HEIGHT = 340
_COLOURS = {"pretrained": BLUE, "random twin": CORAL}
_EXTREME = 2.0  # a loss above this many times the larger of the two ends is shown as that


def normal_share(top: float) -> float:
    """Return the share of the squared norm that the largest `top` of the entries hold under a normal distribution."""
    if top >= 1.0:
        return 1.0
    normal = statistics.NormalDist()
    z = normal.inv_cdf(1 - top / 2)
    return 2 * z * normal.pdf(z) + top


def histogram_figure(sides: Mapping[str, GradientMeasure]) -> Figure:
    """Return how many entries have which |g|, each side in percent of its entries."""
    traces = []
    for name, side in sides.items():
        used = [place for place, count in enumerate(side.histogram) if count]
        places = range(max(0, min(used, default=0) - 1), min(len(side.histogram), max(used, default=0) + 2))
        x = [10 ** (LOWEST_DECADE + (place + 0.5) / BINS_PER_DECADE) for place in places]
        y = [100 * side.histogram[place] / side.numel for place in places]
        traces.append(_line(x, y, name, shape="hvh", fill="tozeroy"))
    figure = _figure(traces, "|g| of an entry, loss per unit of weight", "entries in a quarter decade, %")
    figure["layout"]["xaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1}
    return figure


def top_figure(sides: Mapping[str, GradientMeasure]) -> Figure:
    """Return the share of the squared norm over the share of the entries that are largest, in percent."""
    traces = [
        _line([100 * x for x, _ in side.top], [100 * y for _, y in side.top], name, mode="lines+markers")
        for name, side in sides.items()
    ]
    shares = [x for x, _ in next(iter(sides.values())).top]
    normal = [100 * normal_share(share) for share in shares]
    traces.append(_line([100 * share for share in shares], normal, "normal distribution", colour=GREY, dash="dot"))
    figure = _figure(traces, "largest entries of each weight, %", "share of the squared gradient norm, %")
    figure["layout"]["xaxis"] |= {"type": "log", "tickvals": [0.01, 0.1, 1, 10, 100]}
    return figure


def batches_figure(sides: Mapping[str, GradientMeasure]) -> Figure:
    """Return, batch by batch, what the first batch's top 1 percent hold against each batch's own."""
    traces = []
    for name, side in sides.items():
        at = list(range(1, len(side.own) + 1))
        traces.append(_line(at, [100 * share for share in side.own], f"{name}, own top 1 %", colour=_COLOURS[name]))
        fixed = [100 * share for share in side.first]
        traces.append(_line(at, fixed, f"{name}, first batch's", colour=_COLOURS[name], dash="dot"))
    figure = _figure(traces, "batch", "share of the squared gradient norm, %")
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def tensors_figure(names: Sequence[str], sides: Mapping[str, Sequence[float]]) -> Figure:
    """Return the share that the top 1 percent of each weight hold, in percent, for both models."""
    traces = [
        {
            "type": "bar",
            "name": side,
            "x": [name.removeprefix("model.").removesuffix(".weight") for name in names],
            "y": [100 * share for share in shares],
            "marker": {"color": _COLOURS[side]},
        }
        for side, shares in sides.items()
    ]
    figure = _figure(traces, "", "share held by the top 1 %, %")
    figure["layout"]["xaxis"] |= {"tickangle": -60, "tickfont": {"size": 9}}
    figure["layout"]["height"] = HEIGHT + 120
    return figure


def line_figure(result: LandscapeResult) -> Figure:
    """Return the loss along the line from the random initialisation to the model and beyond."""
    figure = _figure([_line(list(result.alphas), list(result.line), "loss")], "alpha", "loss, nats per token")
    figure["layout"] |= {"shapes": [_mark(0.0), _mark(1.0)], "showlegend": False}
    figure["layout"]["annotations"] = [
        {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": words, "showarrow": False}
        for at, words in ((0, "random initialisation"), (1, "model"))
    ]
    return figure


def plane_figure(result: LandscapeResult) -> Figure:
    """Return the loss over the plane; the highest losses are cut, so that the valleys are seen."""
    known = sorted(loss for row in result.plane for loss in row if loss is not None)
    ceiling = min(known[-1], _EXTREME * known[len(known) // 2]) if known else None
    surface = {
        "type": "heatmap",
        "x": list(result.plane_alphas),
        "y": list(result.plane_betas),
        "z": [list(row) for row in result.plane],
        "zmin": known[0] if known else None,
        "zmax": ceiling,
        "zsmooth": "best",
        "colorscale": [[0.0, "#2b3a7a"], [0.35, BLUE], [0.7, "#dca340"], [1.0, "#f6e7c4"]],
        "hovertemplate": "alpha %{x:.2f}, beta %{y:.2f}: %{z:.3f} nats per token<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": "loss, nats per token", "side": "right"}},
    }
    ends = {
        "type": "scatter",
        "x": [0, 1],
        "y": [0, 0],
        "mode": "markers",
        "marker": {"color": "#ffffff", "size": 7, "line": {"color": "#1d232d", "width": 1}},
        "hoverinfo": "skip",
    }
    figure = _figure([surface, ends], "alpha, towards the model", "beta, across")
    figure["layout"] |= {"hovermode": "closest", "showlegend": False, "height": HEIGHT + 60}
    plate = {"showarrow": False, "yshift": 16, "bgcolor": "#1d232d", "font": {"color": "#e8ebf0"}, "borderpad": 2}
    figure["layout"]["annotations"] = [
        {"x": at, "y": 0, "text": words, **plate} for at, words in ((0, "random initialisation"), (1, "model"))
    ]
    return figure


def births_figure(born: Mapping[str, Mapping[int, int]]) -> Figure:
    """Return, for each run, the share of its entries by the step after which they were chosen, in percent."""
    traces = []
    for number, (name, counts) in enumerate(born.items()):
        total = sum(counts.values())
        shares = [100 * count / total for count in counts.values()]
        traces.append(_line(list(counts), shares, name, colour=PALETTE[number % len(PALETTE)], mode="lines+markers"))
    figure = _figure(traces, "step after which the entry was chosen", "share of the active entries, %")
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def series_figure(series: Mapping[str, Sequence[tuple[float, float, float]]], x: str, y: str, *, log: bool) -> Figure:
    """Return one line a name through points (x, mean, spread), the spread as bars."""
    traces = []
    for number, (name, points) in enumerate(series.items()):
        trace = _line(
            [point[0] for point in points],
            [point[1] for point in points],
            name,
            colour=PALETTE[number % len(PALETTE)],
            mode="lines+markers",
        )
        trace["error_y"] = {"array": [point[2] for point in points], "thickness": 1.2, "width": 3}
        traces.append(trace)
    figure = _figure(traces, x, y)
    if log:
        figure["layout"]["xaxis"]["type"] = "log"
    return figure


def groups_figure(groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], y: str) -> Figure:
    """Return points side by side over named groups: of each series a (mean, spread) a group."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": list(groups),
            "y": [mean for mean, _ in points],
            "error_y": {"array": [spread for _, spread in points], "thickness": 1.2, "width": 4},
            "marker": {"size": 9, "color": PALETTE[number % len(PALETTE)]},
        }
        for number, (name, points) in enumerate(series.items())
    ]
    return _figure(traces, "trained weights", y)


def _line(
    x: Sequence[float],
    y: Sequence[float | None],
    name: str,
    *,
    colour: str = "",
    mode: str = "lines",
    dash: str = "solid",
    shape: str = "linear",
    fill: str = "none",
) -> Figure:
    line = {"color": colour or _COLOURS.get(name, BLUE), "width": 2.5, "dash": dash, "shape": shape}
    return {
        "type": "scatter",
        "x": list(x),
        "y": list(y),
        "name": name,
        "mode": mode,
        "line": line,
        "marker": {"size": 5},
        "fill": fill,
    }


def _mark(at: float) -> Figure:
    line = {"color": GREY, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _figure(traces: Sequence[Figure], x: str, y: str) -> Figure:
    title = {"standoff": 8, "font": {"size": 12}}
    axes = {
        "xaxis": {**AXIS, "showgrid": False, "title": {"text": x, **title}},
        "yaxis": {**AXIS, "nticks": 6, "title": {"text": y, **title}},
    }
    return {"data": list(traces), "layout": {**layout(HEIGHT), **axes, "template": None}}
