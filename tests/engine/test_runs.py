from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from engine import runs
from engine.errors import RunError
from engine.events import EventWriter, Stepped, Warned
from engine.hardware import Device
from engine.spec import RunSpec
from engine.units import GIB


def _run(tmp_path: Path, **fields: object) -> runs.Run:
    return runs.create_run(RunSpec(model="demo", dataset="demo/pirate", output=str(tmp_path), **fields))


def test_created_run_reads_back_its_spec_and_is_queued(tmp_path: Path) -> None:
    run = _run(tmp_path, density=0.02)
    assert runs.read_spec(run).density == 0.02
    assert runs.read_status(run).state == "queued"
    assert runs.list_runs(tmp_path) == [run]
    assert runs.open_run(run.id, tmp_path) == run


def test_runs_made_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    assert len({_run(tmp_path).id for _ in range(3)}) == 3


def test_run_without_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="dataset is missing"):
        runs.create_run(RunSpec(model="demo", output=str(tmp_path)))


def test_events_are_read_once_each_and_torn_lines_wait(tmp_path: Path) -> None:
    run = _run(tmp_path)
    writer = EventWriter(run.events_path)
    writer.write(Warned("first"))
    records, position = runs.read_events(run)
    assert [record.event for record in records] == [Warned("first")]
    with run.events_path.open("a") as file:
        file.write('{"seq": 2, "kind": "warn')
    assert runs.read_events(run, position) == ([], position)


def test_writer_cuts_a_torn_line_and_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventWriter(path).write(Warned("first"))
    with path.open("a") as file:
        file.write('{"seq": 2, "ti')
    EventWriter(path).write(Warned("second"))
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert '"seq": 2' in lines[1]


def test_loss_that_is_not_finite_survives_the_file(tmp_path: Path) -> None:
    run = _run(tmp_path)
    EventWriter(run.events_path).write(Stepped(1, 2, float("nan"), 0.1, 1.0, 1.0, 1, 1, 0.0, 0.0))
    event = runs.read_events(run)[0][0].event
    assert isinstance(event, Stepped)
    assert event.loss != event.loss


def test_request_is_taken_once(tmp_path: Path) -> None:
    run = _run(tmp_path)
    runs.send_request(run, "stop")
    assert runs.take_request(run, "stop")
    assert not runs.take_request(run, "stop")


def test_reconcile_marks_a_lost_run_and_leaves_a_fresh_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    assert runs.reconcile(tmp_path) == []
    monkeypatch.setattr(runs, "START_GRACE_S", 0.0)
    assert runs.reconcile(tmp_path) == [run]
    assert runs.read_status(run).state == "failed"


def test_a_lost_run_quotes_its_newest_worker_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)
    monkeypatch.setattr(runs, "START_GRACE_S", 0.0)
    run.log_path.write_text("process 1 was killed\n")
    runs.mark_start(run)
    runs.reconcile(tmp_path)
    assert runs.read_status(run).detail == "The worker ended without a word."
    with run.log_path.open("a") as log:
        log.write("process 2 was killed\n=====\n")
    (run.checkpoints_path / "5").mkdir(parents=True)
    runs.write_status(run, runs.RunStatus("queued"))
    runs.reconcile(tmp_path)
    assert runs.read_status(run).detail == (
        "The worker ended without a word. Resume the run to go on from its newest checkpoint. "
        "Last line of its log: process 2 was killed"
    )


def test_worker_lock_is_the_sign_of_life(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert not runs.has_worker(run)
    with runs.run_lock(run):
        assert runs.has_worker(run)
        with pytest.raises(RunError, match="Stop it first"):
            runs.delete_run(run)
    runs.delete_run(run)
    assert not run.path.exists()


def test_lines_of_another_version_are_passed_over(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with run.events_path.open("w") as file:
        file.write('{"seq": 1, "time_s": 0.0, "kind": "dream"}\n{"seq": 2, "time_s": 0.0, "kind": "warning"}\n')
    EventWriter(run.events_path).write(Warned("third"))
    records, _ = runs.read_events(run)
    assert [(record.seq, record.event) for record in records] == [(3, Warned("third"))]


def test_many_may_look_for_a_worker_at_once(tmp_path: Path) -> None:
    """A look must not take another look for a worker."""
    run = _run(tmp_path)
    with runs.run_lock(run):
        pass
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: runs.has_worker(run), range(400)))


def test_a_device_is_held_by_one_and_free_again_after_an_error(tmp_path: Path) -> None:
    card, root = Device("cuda:0", "a card", 24 * GIB, 24 * GIB), tmp_path / "runs"
    with suppress(KeyboardInterrupt), runs.device_held(card, root):
        with pytest.raises(RunError, match=r"A chat or a measurement is at work on a card\. Close it"):
            runs.device_held(card, root).__enter__()
        raise KeyboardInterrupt
    with runs.device_held(card, root):
        assert not runs.take_lock(runs.device_lock(root, card.name))


def test_a_device_is_not_taken_from_a_run(tmp_path: Path) -> None:
    card, run = Device("cuda:0", "a card", 24 * GIB, 24 * GIB), _run(tmp_path)
    with runs.run_lock(run), pytest.raises(RunError, match=r"A run is at work on a card\. Wait for it to end\."):
        runs.device_held(card, run.path.parent).__enter__()
