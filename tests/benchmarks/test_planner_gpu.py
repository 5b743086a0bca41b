"""The plan against real steps, in small: the cells on the CPU, and the table of all cells."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import planner_gpu
from benchmarks.planner_gpu import METHODS, MODELS, Cell, cells, held_out, in_turns, measure, small_cells, summary
from engine.hardware import Device
from engine.presets import known_config
from engine.units import GIB

CPU = Device("cpu", "CPU", 64 * GIB, 64 * GIB)


@pytest.mark.parametrize("cell", small_cells(), ids=lambda cell: cell.method)
def test_both_plans_of_a_cell_are_what_its_steps_hold(cell: Cell) -> None:
    row = measure(cell, CPU)
    assert row["ran"]
    for planned in row["planned_allocated_bytes"].values():
        assert planned == pytest.approx(row["allocated_bytes"], rel=0.01)


def test_there_are_enough_cells_of_every_kind_and_half_are_held_out() -> None:
    every = cells()
    assert len({cell.name for cell in every}) == len(every) >= 60
    assert {cell.method for cell in every} == METHODS.keys()
    assert all(known_config(model) for model, _ in MODELS.values())
    outside = held_out(len(every))
    assert len(outside) == len(every) // 2
    assert outside == held_out(len(every))
    assert {every[number].method for number in outside} == METHODS.keys()
    begun = [every[number] for number in in_turns(len(every))[:20]]
    assert {cell.method for cell in begun} == METHODS.keys()
    assert len({cell.model for cell in begun}) >= 5
    assert sorted(in_turns(len(every))) == [*range(len(every))]


def test_the_summary_counts_errors_by_half_and_wrong_verdicts() -> None:
    ways = {"closed form": 110, "trace": 101}
    row = {
        "allocated_bytes": 100,
        "reserved_bytes": None,
        "planned_allocated_bytes": ways,
        "planned_reserved_bytes": ways,
    }
    fine = row | {"ran": True, "verdict": "fits", "held_out": True}
    shy = row | {"ran": True, "verdict": "does not fit", "held_out": False}
    wrong = shy | {"ran": False, "verdict": "fits", "allocated_bytes": None}
    lines = [*summary([fine, shy, wrong])]
    assert lines[:2] == [
        "calibration allocated closed form median error 10.00%, worst 10.00% of 1 cells",
        "calibration allocated trace       median error  1.00%, worst  1.00% of 1 cells",
    ]
    assert lines[-2:] == ["1 of 2 that fit ended out of memory", "1 of 1 that do not fit would have fitted"]


def test_cut_off_it_goes_on_from_what_it_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, measured = tmp_path / "kept.json", list[str]()

    def measure_two_a_time(cell: Cell, device: Device) -> dict[str, Any]:
        if measured and len(measured) % 2 == 0:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return measure(cell, device)

    monkeypatch.setattr(planner_gpu, "measure", measure_two_a_time)
    monkeypatch.setattr("sys.argv", ["planner_gpu", "--device", "cpu", "--readings", str(kept)])
    with pytest.raises(KeyboardInterrupt):
        planner_gpu.main()
    monkeypatch.setattr(planner_gpu, "measure", measure)
    assert planner_gpu.main() == 0
    names = [row["name"] for row in json.loads(kept.read_text())["rows"]]
    assert names[:2] == measured
    assert sorted(names) == sorted(cell.name for cell in small_cells())
    assert f"torch {torch.__version__}" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["planner_gpu", "--device", "cpu", "--seconds", "-1"])
    assert planner_gpu.main() == 0  # nothing is begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["planner_gpu"])
    assert planner_gpu.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
