"""Training in a process of its own: real workers on a tiny model, seen through the run folder.

Most are forked from a server that has loaded the libraries once; the first test, and those of how a process is started
and what it prints, start them as the program does.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import runs, workers
from engine.errors import RunError, WorkerError
from engine.events import DataPrepared, Evaluated, Event, ModelLoaded, StateChanged, Stepped
from engine.runs import Run
from engine.spec import RunSpec

Start = Callable[..., Run]
TIMEOUT_S = 90.0
pytestmark = pytest.mark.xdist_group("forked")
forked = pytest.mark.usefixtures("forked")


@pytest.fixture
def make(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> Iterator[Start]:
    made = []

    def create(**fields: Any) -> Run:
        values = {
            "model": str(model_folder),
            "dataset": str(dataset_folder),
            "density": 0.05,
            "learning_rate": 5e-3,
            "sequence_length": 64,
            "micro_batch_size": 4,
            "gradient_accumulation": 2,
            "max_steps": 20,
            "probe_interval": 0,
            "output": str(tmp_path / "runs"),
        }
        made.append(runs.create_run(RunSpec(**{**values, **fields})))
        return made[-1]

    yield create
    for run in made:
        if runs.has_worker(run):
            os.killpg(runs.read_status(run).pid, signal.SIGKILL)


def _events(run: Run) -> list[Event]:
    return [record.event for record in runs.read_events(run)[0]]


def _wait_for(run: Run, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{runs.read_status(run)}\n{runs.log_tail(run)}"
        time.sleep(0.02)


def _wait_for_step(run: Run, step: int) -> None:
    _wait_for(run, lambda: any(isinstance(event, Stepped) and event.step >= step for event in _events(run)))


def _wait_for_end(run: Run) -> None:
    _wait_for(run, lambda: not runs.has_worker(run) and not runs.read_status(run).is_live)


def test_run_goes_through_its_states_and_leaves_a_delta_and_a_report(make: Start) -> None:
    run = make(exact_match_rows=4, probe_interval=10)
    workers.start_worker(run)
    _wait_for_end(run)
    events = _events(run)
    states = [event.state for event in events if isinstance(event, StateChanged)]
    kinds = [type(event) for event in events]
    assert runs.read_status(run).state == "finished", runs.log_tail(run)
    assert [state for before, state in zip(["", *states], states, strict=False) if before != state] == [
        "preparing",
        "running",
        "finished",
    ]
    assert kinds.index(DataPrepared) < kinds.index(ModelLoaded) < kinds.index(Evaluated) < kinds.index(Stepped)
    report = runs.read_report(run)
    assert report["steps"] == 20
    assert report["evaluation_loss"]["tuned"] < report["evaluation_loss"]["base"]
    assert report["exact_match"]["base"] == 0.0
    assert report["peak_bytes"] > 0
    assert (run.delta_path / "delta.safetensors").is_file()


@forked
def test_stopped_run_goes_on_to_the_same_bits_as_an_unbroken_one(make: Start) -> None:
    broken, whole = make(max_steps=60), make(max_steps=60)
    workers.start_worker(broken)
    _wait_for_step(broken, 5)
    runs.send_request(broken, "stop")
    _wait_for_end(broken)
    assert runs.read_status(broken).state == "stopped", runs.log_tail(broken)
    stopped_at = runs.read_status(broken).step
    assert 5 <= stopped_at < 60
    workers.start_worker(broken)
    workers.start_worker(whole)  # waits in the queue until the other one is done
    _wait_for_end(broken)
    _wait_for_end(whole)
    first, second = (load_file(run.delta_path / "delta.safetensors") for run in (broken, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@forked
def test_killed_worker_reads_as_failed_and_can_be_resumed(make: Start) -> None:
    run = make(max_steps=40, checkpoint_interval=5)
    pid = workers.start_worker(run)
    _wait_for(run, lambda: runs.latest_checkpoint(run) is not None)
    os.kill(pid, signal.SIGKILL)
    _wait_for(run, lambda: not runs.has_worker(run))
    assert runs.reconcile(run.path.parent) == [run]
    assert runs.read_status(run).state == "failed"
    workers.start_worker(run)
    _wait_for_end(run)
    assert runs.read_status(run).state == "finished", runs.log_tail(run)
    assert runs.read_report(run)["steps"] == 40


@forked
def test_second_run_waits_its_turn_and_can_be_stopped_while_it_waits(make: Start) -> None:
    first, second = make(max_steps=2000), make()
    workers.start_worker(first)
    _wait_for_step(first, 1)
    workers.start_worker(second)
    _wait_for(second, lambda: "Waiting for another run" in runs.read_status(second).detail)
    with pytest.raises(RunError, match=f"{second.id} is at work already"):
        workers.start_worker(second)
    with pytest.raises(RunError, match=r"is still queued\. Stop it first"):
        runs.delete_run(second)
    runs.send_request(second, "stop")
    runs.send_request(first, "stop")
    _wait_for_end(second)
    _wait_for_end(first)
    assert [runs.read_status(run).state for run in (first, second)] == ["stopped", "stopped"]


@forked
def test_stop_in_the_last_evaluation_leaves_a_run_that_can_go_on(make: Start) -> None:
    run = make(max_steps=3)
    workers.start_worker(run)
    _wait_for_step(run, 3)
    runs.send_request(run, "stop")  # after the last step, before or in the evaluation of the result
    _wait_for_end(run)
    if runs.read_status(run).state == "stopped":
        workers.start_worker(run)
        _wait_for_end(run)
    assert runs.read_status(run).state == "finished", runs.log_tail(run)
    assert runs.read_report(run)["evaluation_loss"]["tuned"] is not None


@forked
def test_stop_before_the_first_step_keeps_no_half_figures(make: Start) -> None:
    run = make(max_steps=3)
    workers.start_worker(run)
    runs.send_request(run, "stop")
    _wait_for_end(run)
    assert runs.read_status(run).state == "stopped", runs.log_tail(run)
    assert not any(isinstance(event, Evaluated) for event in _events(run))
    workers.start_worker(run)
    _wait_for_end(run)
    assert runs.read_report(run)["evaluation_loss"]["base"] is not None


def test_worker_that_does_not_begin_in_time_is_ended_and_said(make: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 0.2)
    run = make()
    with pytest.raises(WorkerError, match=f"Run {run.id}: The worker ended before it began"):
        workers.start_worker(run)
    time.sleep(1.0)
    assert runs.read_status(run).state == "failed"
    assert not runs.has_worker(run)


@forked
def test_failure_is_one_sentence_in_the_status(make: Start, tmp_path: Path) -> None:
    run = make(dataset=str(tmp_path / "missing.jsonl"))
    workers.start_worker(run)
    _wait_for_end(run)
    status = runs.read_status(run)
    assert status.state == "failed"
    assert "missing.jsonl" in status.detail
    assert "Traceback" not in status.detail


@forked
def test_a_run_recomputes_as_its_first_session_did(make: Start) -> None:
    run = make(recompute="auto", max_steps=40, evaluation_interval=0)
    workers.start_worker(run)
    _wait_for_step(run, 2)
    runs.send_request(run, "stop")
    _wait_for_end(run)
    assert runs.read_plan(run)["recompute"] == "nothing"  # all fits
    runs.write_json(run.path / "plan.json", {**runs.read_plan(run), "recompute": "mlp", "recompute_blocks": 1})
    workers.start_worker(run)
    _wait_for_end(run)
    plan = runs.read_plan(run)
    assert (plan["recompute"], plan["recompute_blocks"], runs.read_status(run).state) == ("mlp", 1, "finished")


@forked
@pytest.mark.parametrize("fields", [{"recompute": "mlp"}, {"recompute": "blocks", "recompute_blocks": 1}])
def test_what_is_recomputed_changes_no_loss(make: Start, fields: dict[str, Any]) -> None:
    losses = []
    for each in ({}, fields):
        run = make(max_steps=4, evaluation_interval=0, **each)
        workers.start_worker(run)
        _wait_for_end(run)
        losses.append([event.loss for event in _events(run) if isinstance(event, Stepped)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_log_of_an_adapter_holds_no_warning_of_the_libraries(make: Start) -> None:
    run = make(method="lora", gradient_checkpointing=True, max_steps=1, evaluation_interval=0)
    workers.start_worker(run)
    _wait_for_end(run)
    assert runs.read_status(run).state == "finished", runs.log_tail(run)
    assert "Warning" not in runs.log_tail(run)
