"""The probe measures this computer, and the plan of the demo then uses it."""

import threading
import time
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.hardware import resolve_device
from engine.planner.calibration import read_calibration
from engine.planner.plan import make_plan
from engine.presets import load_preset
from engine.runs import create_run, device_lock, run_lock, take_lock
from engine.spec import RunSpec
from engine.units import MIB


def _await_holder(root: Path, held: threading.Event) -> None:
    while not held.is_set():
        lock = device_lock(root, "cpu")
        if not take_lock(lock):
            held.set()
        lock.release()
        time.sleep(0.05)


def test_a_probe_of_the_cpu_is_used_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path))
    held = threading.Event()
    threading.Thread(target=_await_holder, args=(tmp_path, held), daemon=True).start()
    assert main(["calibrate", "--device", "cpu", "--runs", str(tmp_path)]) == 0
    assert held.is_set()
    assert take_lock(device_lock(tmp_path, "cpu"))
    known = read_calibration(resolve_device("cpu"))
    assert known.context_bytes is not None
    assert known.workspace_bytes is not None
    assert 200 * MIB < known.context_bytes < 1500 * MIB
    assert known.workspace_bytes < 500 * MIB
    plan = make_plan(load_preset("demo").model_copy(update={"device": "cpu"}))
    assert plan.parts["context"] == known.context_bytes
    assert plan.step_s is not None
    assert "TFLOP/s in float32 on a model" in capsys.readouterr().out


def test_nothing_is_measured_beside_a_run_or_what_else_has_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", "--device", "cpu", "--runs", str(tmp_path)]
    with run_lock(create_run(RunSpec(model="demo", dataset="demo/pirate", output=str(tmp_path)))):
        assert main(command) == 2
    assert "A run is at work, so the figures would not be this computer's." in capsys.readouterr().err
    with device_lock(tmp_path, "cpu"):
        assert main(command) == 2
    assert "A chat or a measurement is at work on CPU. Close it" in capsys.readouterr().err
