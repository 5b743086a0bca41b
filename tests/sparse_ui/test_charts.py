"""Charts as plain functions."""

import math

import numpy as np
import pytest

from engine.events import Evaluated, Probed, Stepped
from engine.units import GIB
from sparse_ui import charts


def _step(step: int, total: int = 100, loss: float = 1.0) -> Stepped:
    return Stepped(step, total, loss, 1e-4, 0.5, 1000.0, 2 * GIB, 3 * GIB, float(step), float(total - step))


def _points(figure: charts.go.Figure) -> int:
    return sum(len(trace.x) for trace in figure.data)


def test_no_figure_sends_more_than_two_thousand_points() -> None:
    steps = [_step(number, 50_000) for number in range(1, 50_001)]
    evaluations = [Evaluated(number, 1.0) for number in range(5_000)]
    probes = [Probed(number, 0.1, 0.2, 0.3, {}) for number in range(5_000)]
    planned = charts.PlannedMemory(3 * GIB, 2 * GIB, 4 * GIB)
    figures = [
        charts.loss_figure(steps, evaluations, "run"),
        charts.coverage_figure(probes, steps, "run"),
        charts.memory_figure(steps, planned, "run"),
        charts.comparison_figure([(str(number), steps, evaluations) for number in range(7)]),
    ]
    assert max(_points(figure) for figure in figures) <= charts.MAX_POINTS


@pytest.mark.parametrize("steps", [[], [_step(1)], [_step(1, loss=math.nan), _step(2)]])
def test_short_and_broken_runs_draw(steps: list[Stepped]) -> None:
    figure = charts.loss_figure(steps, [], "run")
    assert figure.layout.uirevision == "run"
    assert len(charts.memory_figure(steps, None, "run").data) == 2


def test_spread_keeps_first_and_last() -> None:
    indices = charts.spread(12_345, 100)
    assert (indices[0], indices[-1], len(indices)) == (0, 12_344, 100)


def test_running_mean_ignores_what_is_not_a_number() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0])
    np.testing.assert_allclose(charts.running_mean(values, 2), [1.0, 1.0, 3.0, 4.0])


def test_layer_grid_places_each_tensor() -> None:
    tensors = {
        "model.layers.10.mlp.down_proj.weight": 0.4,
        "model.layers.2.self_attn.q_proj.weight": 0.1,
        "model.embed_tokens.weight": 0.3,
    }
    layers, modules, grid = charts.layer_grid(tensors)
    assert (layers, modules) == (["2", "10", "-"], ["q_proj", "down_proj", "embed_tokens"])
    assert (grid[0, 0], grid[1, 1], grid[2, 2]) == (0.1, 0.4, 0.3)
    assert np.isnan(grid[0, 1])


def test_memory_figure_uses_the_unit_that_fits() -> None:
    figure = charts.memory_figure([_step(1)], charts.PlannedMemory(3 * GIB, 2 * GIB, 4 * GIB), "run")
    assert figure.layout.yaxis.ticksuffix == " GiB"
    assert figure.data[1].y[0] == 3.0


def test_figures_leave_the_background_to_the_page() -> None:
    figure = charts.gradient_figure(None, "run")
    assert figure.layout.plot_bgcolor == figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
