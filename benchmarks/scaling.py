"""How the cost of sparse tuning grows with tokens and with trained entries: `python -m benchmarks.scaling`.

The model of `benchmarks.speed` on the CPU, one thread: rows of 128 to 2,048 tokens at a density of 1 percent, and 0.1
to 5 percent at 512 tokens, masks of spread 1, the gradient by compaction; all take turns in one process. Cost is what a
step takes beyond one that trains nothing (medians of the differences), in units of that step at 512 tokens. A line is
fitted through each row of points by least squares, and how far the points lie from it is said. `--page FILE` draws
both, one file that works offline.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed import ROUNDS, measure
from benchmarks.subjects import CPU_SIZE, Lab, Size, Subject, versions
from engine.analysis.look import AXIS, BLUE, GREY, layout

TOKENS = (128, 256, 512, 1024, 2048)
DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
UNIT_TOKENS, UNIT_DENSITY = 512, 0.01
HEIGHT = 340  # pixels of a plot


@dataclass(frozen=True)
class Point:
    """One setting: a step over the frozen one, and what it takes beyond it in frozen steps of 512 tokens."""

    tokens: int
    density: float
    ratio: float
    cost: float


@dataclass(frozen=True)
class Line:
    """cost = start + slope x. `off`: the largest distance of a point from it, over the largest cost."""

    start: float
    slope: float
    off: float


def points(size: Size, tokens: Sequence[int], densities: Sequence[float], rounds: int) -> dict[str, list[Point]]:
    """Measure both series on the CPU: by tokens, and by density; `UNIT_TOKENS` is among the tokens."""
    settings = [(count, UNIT_DENSITY) for count in tokens]
    settings += [(UNIT_TOKENS, density) for density in densities if density != UNIT_DENSITY]
    labs = {count: Lab(replace(size, tokens=count)) for count in tokens}
    made: list[Subject] = [lab.frozen() for lab in labs.values()]
    for count, density in settings:
        made.append(labs[count].sparse(f"{count}, {density}", density=density, gradient_way="compaction"))
    timed = [each.seconds for each in measure(made, "cpu", rounds)]
    frozen = dict(zip(tokens, timed, strict=False))
    unit = statistics.median(frozen[UNIT_TOKENS])
    found = {}
    for (count, density), mine in zip(settings, timed[len(labs) :], strict=True):
        pairs = [*zip(mine, frozen[count], strict=True)]
        ratio, extra = (statistics.median(each) for each in ([a / b for a, b in pairs], [a - b for a, b in pairs]))
        found[count, density] = Point(count, density, ratio, extra / unit)
    return {
        "tokens": [found[count, UNIT_DENSITY] for count in tokens],
        "density": [found[UNIT_TOKENS, density] for density in densities],
    }


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Return the line of least squares through the points."""
    slope, start = np.polyfit(x, y, 1)
    off = max(abs(start + slope * at - cost) for at, cost in zip(x, y, strict=True)) / max(map(abs, y))
    return Line(float(start), float(slope), float(off))


def series(found: dict[str, list[Point]]) -> dict[str, tuple[list[float], list[float], Line]]:
    """Return x, cost and the line of both; tokens, and density in percent."""
    given = {}
    for name, row in found.items():
        x = [100 * each.density if name == "density" else float(each.tokens) for each in row]
        cost = [each.cost for each in row]
        given[name] = (x, cost, fit(x, cost))
    return given


def page(found: dict[str, list[Point]]) -> str:
    """Return a page with both plots, as tall as it is wide by half, that needs nothing else."""
    from plotly.offline import get_plotlyjs

    titles = {"tokens": "tokens of a row, at 1 percent", "density": "trained entries, percent, at 512 tokens"}
    figures = [_figure(*row, titles[name]) for name, row in series(found).items()]
    plots = "".join(f'<div id="plot{number}"></div>' for number in range(len(figures)))
    data = json.dumps(figures)
    script = 'FIGURES.forEach((f, n) => Plotly.newPlot("plot" + n, f.data, f.layout, {displayModeBar: false}));'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Cost of sparse tuning</title><style>'
        "body { margin: 24px; display: grid; grid-template-columns: 1fr 1fr; gap: 24px; background: #fff }</style>"
        f"{plots}<script>{get_plotlyjs()}</script><script>const FIGURES = {data};{script}</script></html>"
    )


def _figure(x: list[float], y: list[float], line: Line, title: str) -> dict[str, Any]:
    ends = [0.0, x[-1]]
    data = [
        {"x": x, "y": y, "name": "measured", "mode": "markers", "marker": {"color": BLUE, "size": 9}},
        {
            "x": ends,
            "y": [line.start + line.slope * at for at in ends],
            "name": f"line, off by at most {line.off:.1%}",
            "mode": "lines",
            "line": {"color": GREY, "dash": "dot"},
        },
    ]
    axes = {
        "xaxis": AXIS | {"title": {"text": title}},
        "yaxis": AXIS | {"title": {"text": "cost, frozen steps"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout(HEIGHT) | axes}


def rows(found: dict[str, list[Point]]) -> list[dict[str, Any]]:
    """Return a row a point."""
    return [
        {
            "name": f"sparse / frozen, {each.tokens} tokens, {100 * each.density:g} %",
            "device": "cpu",
            "ratio": round(each.ratio, 4),
            "goal": None,
            "series": name,
            "cost": round(each.cost, 4),
        }
        for name, row in found.items()
        for each in row
    ]


def main() -> None:
    """Print both series and their lines, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--readings", type=Path)
    parser.add_argument("--page", type=Path, help="HTML with the plots")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = points(CPU_SIZE, TOKENS, DENSITIES, options.rounds)
    table = rows(found)
    if options.readings:
        whole = {"versions": versions("cpu"), "rounds": options.rounds, "rows": table}
        options.readings.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(page(found), encoding="utf-8")
    if options.json:
        print(json.dumps(table))
        return
    for row in table:
        print(f"{row['name']:<40}{row['ratio']:.3f}   cost {row['cost']:.4f}")
    for name, (_, _, line) in series(found).items():
        print(f"{name}: cost = {line.start:.4f} + {line.slope:.6f} x, off by at most {line.off:.1%} of the largest")


if __name__ == "__main__":
    main()
