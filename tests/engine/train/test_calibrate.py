"""The probe measures this computer, and the plan of the demo then uses it."""

from pathlib import Path

import pytest

from engine.__main__ import main
from engine.hardware import resolve_device
from engine.planner.calibration import read_calibration
from engine.planner.plan import make_plan
from engine.presets import load_preset
from engine.units import MIB


def test_a_probe_of_the_cpu_is_used_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path))
    assert main(["calibrate", "--device", "cpu"]) == 0
    known = read_calibration(resolve_device("cpu"))
    assert known.context_bytes is not None
    assert known.workspace_bytes is not None
    assert 200 * MIB < known.context_bytes < 1500 * MIB
    assert known.workspace_bytes < 500 * MIB
    plan = make_plan(load_preset("demo").model_copy(update={"device": "cpu"}))
    assert plan.parts["context"] == known.context_bytes
    assert plan.step_s is not None
    assert "TFLOP/s in float32 on a model" in capsys.readouterr().out
