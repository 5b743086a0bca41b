"""The button that measures this computer."""

import time
from pathlib import Path

import gradio as gr
import pytest

from engine import runs
from engine.hardware import Gpu, resolve_device
from engine.planner.calibration import read_calibration
from engine.runs import RunStatus
from engine.spec import RunSpec
from engine.units import GIB
from sparse_ui.context import AppContext, Settings
from sparse_ui.form import fill_form
from sparse_ui.plan_view import view_plan
from sparse_ui.tabs.measure import WAITS, start_measure, view_measure

SPEC = RunSpec(model="demo", dataset="demo/pirate", sequence_length=64, device="cpu")


def _ended(context: AppContext) -> list[object]:
    deadline = time.monotonic() + 120
    while context.errands.busy() and time.monotonic() < deadline:
        time.sleep(0.2)
    return view_measure(context, None)


def test_measuring_says_what_was_found_and_the_plan_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path / "cache"))
    context = AppContext(Settings(tmp_path))
    assert "Measure this computer" in view_plan(fill_form(SPEC), "runs").card
    assert "Measuring this computer" in start_measure(context, "cpu")
    assert view_measure(context, None)[0] == gr.update(interactive=False)
    button, _, said, measured, _ = _ended(context)
    rate = read_calibration(resolve_device("cpu")).rates[-1]
    assert f"{rate.flops_per_s / 1e12:.3g} TFLOP/s" in str(said)
    assert (button, measured) == (gr.update(interactive=True), said)
    assert "A step of full rows takes about" in view_plan(fill_form(SPEC), "runs").card


def test_a_wrong_device_is_the_engines_sentence(tmp_path: Path) -> None:
    context = AppContext(Settings(tmp_path))
    start_measure(context, "cuda:99")
    assert "Device &#x27;cuda:99&#x27; is not here" in str(_ended(context)[2])


def test_nothing_is_measured_beside_a_run(tmp_path: Path) -> None:
    run = runs.create_run(SPEC.model_copy(update={"output": str(tmp_path)}))
    runs.write_status(run, RunStatus("running", step=1, total_steps=2))
    context = AppContext(Settings(tmp_path))
    assert WAITS.split(",")[0] in start_measure(context, "auto")
    assert view_measure(context, None)[0] == gr.update(interactive=False)
    assert not context.errands.busy()


def test_the_chat_of_the_app_makes_room_for_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.hardware.list_gpus", lambda: [Gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, None, 89)])
    run = runs.create_run(SPEC.model_copy(update={"output": str(tmp_path)}))
    runs.write_status(run, RunStatus("finished"))
    run.delta_path.mkdir()
    (run.delta_path / "delta.json").write_text("{}", encoding="utf-8")
    context = AppContext(Settings(tmp_path))
    with pytest.raises(Exception, match="delta"):
        [*context.chat.stream(run, {"tuned": [{"role": "user", "content": "hello"}]}, 4, 0.0)]
    assert context.chat._holds(run)
    with runs.device_lock(tmp_path, "cpu"):  # what `auto` is to the command, which no card answers
        assert "Measuring this computer" in start_measure(context, "auto")
        assert not context.chat._holds(run)
        assert "A chat or a measurement is at work on CPU." in str(_ended(context)[2])
