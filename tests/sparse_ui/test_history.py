"""Reading the events of a run, bit by bit."""

from pathlib import Path

from engine.events import Evaluated, EventWriter, Probed, Stepped
from engine.runs import Run
from sparse_ui.history import HistoryReader


def _step(step: int) -> Stepped:
    return Stepped(step, 10, 1.0 / step, 1e-4, 0.5, 1000.0, 1, 1, float(step), 0.0)


def _write(run: Run, *events: Stepped | Evaluated | Probed) -> None:
    run.path.mkdir(exist_ok=True)
    writer = EventWriter(run.events_path)
    for event in events:
        writer.write(event)
    writer.close()


def test_reading_in_two_goes_equals_reading_at_once(tmp_path: Path) -> None:
    run, reader = Run(tmp_path / "run"), HistoryReader()
    _write(run, Evaluated(0, 2.0), _step(1))
    reader.read(run)
    _write(run, _step(2), Evaluated(2, 1.0))
    assert reader.read(run) == HistoryReader().read(run)


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    _write(run, *(_step(step) for step in range(1, 6)), Evaluated(5, 9.0), _step(4), _step(5))
    history = HistoryReader().read(run)
    assert [step.step for step in history.steps] == [1, 2, 3, 4, 5]
    assert history.evaluations == {}


def test_a_line_being_written_waits(tmp_path: Path) -> None:
    run, reader = Run(tmp_path / "run"), HistoryReader()
    _write(run, _step(1))
    with run.events_path.open("a") as file:
        file.write('{"seq": 2, "ti')
    assert reader.read(run).version == 1


def test_an_event_of_another_version_is_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    _write(run, _step(1))
    with run.events_path.open("a") as file:
        file.write('{"seq": 2, "time_s": 0, "kind": "step", "unheard_of": 1}\n')
    _write(run, _step(2))
    assert [step.step for step in HistoryReader().read(run).steps] == [1, 2]


def test_a_run_without_events_is_empty(tmp_path: Path) -> None:
    history = HistoryReader().read(Run(tmp_path))
    assert history.last is None
    assert history.last_evaluation is None
