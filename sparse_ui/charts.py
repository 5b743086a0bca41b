"""Plain data -> plotly figures. At most 2,000 points each; no template, no frame, readable on white and near-black."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from engine.analysis.look import AMBER, AXIS, BLUE, CORAL, GREY, PALETTE, TEAL, TEXT, layout
from engine.events import Evaluated, Probed, Stepped
from engine.units import GIB, MIB

MAX_POINTS = 2000
_HEIGHT = 236
_MODULES = (  # as data flows in a block: of Llama, of BERT
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "attention.output", "intermediate", "output"),
)
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class PlannedMemory:
    """What the plan said of the run's device memory, in bytes."""

    peak_bytes: int
    lower_bytes: int
    upper_bytes: int


def loss_figure(steps: Sequence[Stepped], evaluations: Sequence[Evaluated], key: str) -> go.Figure:
    """Return the training loss, thin as measured and thick as a running mean, with the held-out loss.

    Args:
        steps: in order; a loss may be NaN.
        evaluations: in order of step.
        key: the run's id, which keeps the zoom between updates.
    """
    at = np.array([step.step for step in steps])
    loss = np.array([step.loss for step in steps], dtype=float)
    smooth = running_mean(loss, window=max(5, (steps[-1].total_steps if steps else 0) // 40))
    keep = spread(len(at), 800)
    held = spread(len(evaluations), 300)
    held_at = np.array([item.step for item in evaluations])[held]
    held_loss = np.array([item.loss for item in evaluations], dtype=float)[held]
    figure = _figure(key, hover=".4f")
    figure.add_trace(_line(at[keep], loss[keep], BLUE, "train", width=1, opacity=0.35, legend=False))
    figure.add_trace(_line(at[keep], smooth[keep], BLUE, "train, running mean"))
    figure.add_trace(_line(held_at, held_loss, CORAL, "held-out", mode="lines+markers"))
    _span(figure, steps)
    return _finished(figure)


def coverage_figure(probes: Sequence[Probed], steps: Sequence[Stepped], key: str) -> go.Figure:
    """Return how much of the gradient's squared norm the trained entries hold, in percent, over the steps."""
    probes = [probes[index] for index in spread(len(probes), 600)]
    at = np.array([probe.step for probe in probes])
    figure = _figure(key, hover=".1f", suffix=" %")
    for name, label, colour in (
        ("best_share", "best of batch", AMBER),
        ("selected_share", "trained", TEAL),
        ("top_share", "top 1 %", GREY),
    ):
        shares = 100 * np.array([getattr(probe, name) for probe in probes], dtype=float)
        dash = "dot" if name == "top_share" else "solid"
        figure.add_trace(_line(at, shares, colour, label, mode="lines+markers", dash=dash))
    figure.update_yaxes(rangemode="tozero")
    _span(figure, steps)
    return _finished(figure)


def memory_figure(steps: Sequence[Stepped], planned: PlannedMemory | None, key: str) -> go.Figure:
    """Return the memory in use and its peak so far, with the band that the plan predicted for the peak."""
    keep = spread(len(steps), 800)
    at = np.array([step.step for step in steps])[keep]
    largest = max([step.peak_bytes for step in steps] + ([planned.upper_bytes] if planned else []), default=0)
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    used = np.array([step.memory_bytes for step in steps], dtype=float)[keep] / unit
    peak = np.array([step.peak_bytes for step in steps], dtype=float)[keep] / unit
    figure = _figure(key, hover=".1f", suffix=f" {name}")
    figure.add_trace(_line(at, used, BLUE, "in use", width=1.5, opacity=0.6))
    figure.add_trace(_line(at, peak, BLUE, "peak so far"))
    if planned:
        low, high = planned.lower_bytes / unit, planned.upper_bytes / unit
        figure.add_hrect(y0=low, y1=high, fillcolor=GREY, opacity=0.25, line_width=0, layer="below")
        ends = np.array([0, steps[-1].total_steps if steps else 1])
        level = np.full(2, planned.peak_bytes / unit)
        figure.add_trace(_line(ends, level, GREY, "planned peak", width=1.5, dash="dash"))
    figure.update_yaxes(rangemode="tozero")
    _span(figure, steps)
    return _finished(figure)


def gradient_figure(probe: Probed | None, key: str) -> go.Figure:
    """Return layer x module: the share of each tensor's squared gradient norm that its top 1 percent holds."""
    layers, modules, shares = layer_grid({} if probe is None else {n: s[0] for n, s in probe.tensors.items()})
    figure = _figure(key)
    colours = [[0.0, "rgba(91,121,232,0.08)"], [1.0, "rgba(91,121,232,1)"]]
    figure.add_trace(
        go.Heatmap(
            x=layers,
            y=modules,
            z=100 * shares,
            xgap=3,
            ygap=3,
            zmin=0,
            zmax=_ceiling(shares),
            colorscale=colours,
            hoverongaps=False,
            hovertemplate="layer %{x}, %{y}: %{z:.1f} %<extra></extra>",
            colorbar={"thickness": 8, "outlinewidth": 0, "ticksuffix": " %", "nticks": 3, "tickfont": {"size": 11}},
        )
    )
    figure.update_layout(hovermode="closest", margin={"l": 4, "r": 0, "t": 8, "b": 4})
    figure.update_xaxes(type="category", title={"text": "layer", "standoff": 4, "font": {"size": 11}}, showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed", dtick=1)
    return _finished(figure)


def comparison_figure(runs: Sequence[tuple[str, Sequence[Stepped], Sequence[Evaluated]]]) -> go.Figure:
    """Return the running means of several runs' training losses, with their held-out losses dotted.

    Args:
        runs: name, steps and evaluations of each run.
    """
    figure = _figure("compare", hover=".4f", height=300)
    limit = MAX_POINTS // max(1, 2 * len(runs))
    for number, (name, steps, evaluations) in enumerate(runs):
        colour = PALETTE[number % len(PALETTE)]
        keep = spread(len(steps), limit)
        smooth = running_mean(np.array([step.loss for step in steps], dtype=float), max(5, len(steps) // 40))
        figure.add_trace(_line(np.array([step.step for step in steps])[keep], smooth[keep], colour, name))
        held = [evaluations[index] for index in spread(len(evaluations), limit)]
        held_at, held_loss = np.array([item.step for item in held]), np.array([item.loss for item in held])
        figure.add_trace(_line(held_at, held_loss, colour, f"{name}, held-out", dash="dot", legend=False))
    return _finished(figure)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of each value and up to `window - 1` before it; NaN counts as absent."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])
    return mean


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """Return at most `limit` indices spread evenly over `count`, first and last among them."""
    if count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).astype(np.int64)


def layer_grid(tensors: dict[str, float]) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return layers, modules and their figures as (modules, layers); NaN where a layer lacks the module.

    A parameter outside the layers (embeddings) stands in a column of its own, `-`.
    """
    cells: dict[tuple[str, str], float] = {}
    for name, figure in tensors.items():
        match = _LAYER.search(name)
        layer = match.group(1) if match else "-"
        cells[layer, _module_of(name[match.end() :] if match else name)] = figure
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda word: (not word.isdigit(), int(word) if word.isdigit() else 0)
    )
    modules = sorted({module for _, module in cells}, key=_reading_order)
    grid = np.array([[cells.get((layer, module), np.nan) for layer in layers] for module in modules], dtype=float)
    return layers, modules, grid.reshape(len(modules), len(layers))


def _module_of(name: str) -> str:
    """Return the last word of a weight; of BERT's layers, which are all called dense, those before it."""
    words = name.removesuffix(".weight").split(".")
    return ".".join(words[-3:-1]) if words[-1] == "dense" and len(words) > 1 else words[-1]


def _reading_order(module: str) -> tuple[int, str]:
    return (_MODULES.index(module) if module in _MODULES else len(_MODULES), module)


def _ceiling(shares: NDArray[np.float64]) -> float:
    """Return the top of the colour scale in percent: the largest share, rounded up to tens."""
    known = shares[np.isfinite(shares)]
    return float(10 * np.ceil(10 * known.max())) if known.size else 100.0


def _line(
    x: NDArray[np.int64],
    y: NDArray[np.float64],
    colour: str,
    name: str,
    *,
    width: float = 2.5,
    opacity: float = 1.0,
    mode: str = "lines",
    dash: str = "solid",
    legend: bool = True,
) -> go.Scatter:
    line = {"color": colour, "width": width, "dash": dash}
    return go.Scatter(x=x, y=y, mode=mode, name=name, line=line, marker={"size": 5}, opacity=opacity, showlegend=legend)


def _span(figure: go.Figure, steps: Sequence[Stepped]) -> None:
    """Let the steps axis reach to the end of the run from the start, so that a plot fills without moving."""
    if steps:
        figure.update_xaxes(range=[0, 1.01 * steps[-1].total_steps])


def _figure(key: str, *, hover: str = "", suffix: str = "", height: int = _HEIGHT) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(template=None, uirevision=key, **layout(height))
    figure.update_xaxes(**AXIS, showgrid=False, rangemode="tozero")
    figure.update_yaxes(**AXIS, hoverformat=hover, nticks=5)
    if suffix:
        figure.update_yaxes(ticksuffix=suffix)
    return figure


def _finished(figure: go.Figure) -> go.Figure:
    """Return the figure; where it has no points yet, words instead of axes that mean nothing."""
    if all(trace.x is None or not len(trace.x) for trace in figure.data):
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        figure.add_annotation(text="Nothing yet", showarrow=False, font={"color": TEXT}, xref="paper", yref="paper")
    return figure
