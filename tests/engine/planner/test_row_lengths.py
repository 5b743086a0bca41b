"""How long a dataset's rows are: counted once, for as long as its files stay as they are."""

import json
import sys
import time
from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import pytest

from engine.errors import DatasetError
from engine.planner.plan import make_plan
from engine.planner.row_lengths import (
    PASSING_S,
    RowLengths,
    keep_lengths,
    keep_uncounted,
    known_lengths,
    why_refused,
    why_uncounted,
)
from engine.planner.trace_worker import main
from engine.runs import RunStatus, create_run, write_status
from engine.spec import RunSpec
from engine.tracer import Tracer
from engine.workers import start_run, take_back

pytestmark = pytest.mark.xdist_group("tracer")
ROWS = [{"question": "How are you?", "answer": "Fine. " * number} for number in range(1, 41)]


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A spec of the demo model over a file of forty rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return RunSpec(model="demo", dataset=str(file), device="cpu", sequence_length=512)


def test_rows_are_counted_once_and_again_when_the_file_changes(spec: RunSpec, tracer: Tracer) -> None:
    assert known_lengths(spec) is None
    found = tracer.count(spec)
    assert found is not None
    assert found.rows < len(ROWS)  # some are held out
    assert found.mean < found.longest < 200
    assert known_lengths(spec) == found
    assert known_lengths(spec.model_copy(update={"learning_rate": 0.5})) == found
    assert known_lengths(spec.model_copy(update={"sequence_length": 64})) is None
    Path(spec.dataset or "").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]))
    assert known_lengths(spec) is None
    assert tracer.count(spec) == known_lengths(spec) != found


def test_a_dataset_that_cannot_be_counted_is_not_tried_twice(spec: RunSpec, tracer: Tracer) -> None:
    Path(spec.dataset or "").write_text("{")
    assert tracer.count(spec) is None
    assert "rows.jsonl" in why_uncounted(spec)
    other = Tracer()
    assert other.count(spec) is None
    assert other._process is None  # nobody was asked


def test_what_passes_by_itself_is_tried_again(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    away = spec.model_copy(update={"model": "owner/not-here"})
    monkeypatch.setattr("sys.stdout", sys.stdout)  # which the process of traces takes for itself
    assert main(StringIO(json.dumps({"spec": away.model_dump(mode="json")})), StringIO()) == 0
    assert "owner/not-here" in why_uncounted(away)
    later = time.time() + PASSING_S + 1
    monkeypatch.setattr("time.time", lambda: later)
    assert why_uncounted(away) == ""
    keep_uncounted(away, "nothing to read")
    later += 1e9
    assert why_uncounted(away) == "nothing to read"


def test_what_is_kept_of_a_file_goes_when_its_rights_change(spec: RunSpec) -> None:
    keep_uncounted(spec, "It cannot be read.", refused=True)
    assert why_uncounted(spec) == why_refused(spec) == "It cannot be read."
    Path(spec.dataset or "").chmod(0o600)
    assert why_uncounted(spec) == why_refused(spec) == ""


@pytest.mark.parametrize("own", [True, False])
def test_a_run_is_taken_back_for_its_own_reason_alone(spec: RunSpec, tmp_path: Path, own: bool) -> None:
    keep_uncounted(spec, "There is nothing.", refused=True)
    run = create_run(spec.model_copy(update={"output": str(tmp_path / "runs")}))
    write_status(run, RunStatus("failed", detail="There is nothing." if own else "The card is gone."))
    with pytest.raises(DatasetError, match="nothing") if own else nullcontext():
        take_back(run)
    assert run.path.exists() is not own


def test_no_run_is_made_of_rows_that_are_known_to_be_too_long(spec: RunSpec, tracer: Tracer, tmp_path: Path) -> None:
    Path(spec.dataset or "").write_text(json.dumps({**ROWS[0], "question": "How are you? " * 20}))
    short = spec.model_copy(update={"sequence_length": 8, "output": str(tmp_path / "runs")})
    assert tracer.count(short) is None
    with pytest.raises(DatasetError, match=r"no row to train on: of 1 rows, too long 1\. Raise sequence_length\."):
        start_run(short)
    assert not (tmp_path / "runs").exists()


def test_a_dataset_on_the_hub_is_not_fetched_to_be_counted(spec: RunSpec) -> None:
    tracer = Tracer()
    assert tracer.count(spec.model_copy(update={"dataset": "owner/name"})) is None
    tracer.close()


def test_the_plan_is_for_rows_as_long_as_they_are(spec: RunSpec) -> None:
    lengths = RowLengths(1000, 100, 40.0)
    keep_lengths(spec, lengths)
    plan, full = make_plan(spec, lengths=known_lengths(spec)), make_plan(spec)
    cut = make_plan(spec.model_copy(update={"sequence_length": 100}))
    assert plan.peak_bytes == cut.peak_bytes < full.peak_bytes
    assert plan.row_lengths == lengths


def test_the_time_is_that_of_rows_of_the_average_length(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.planner.plan.rate_for", lambda *_: 1e9)
    short = spec.model_copy(update={"max_steps": None, "epochs": 2.0})
    full, counted = make_plan(short), make_plan(short, lengths=RowLengths(1000, 512, 128.0))
    assert full.step_s is not None
    assert counted.step_s == pytest.approx(full.step_s / 4)
    assert (full.run_s, counted.run_s) == (None, pytest.approx(full.step_s / 4 * -(-2000 // counted.rows)))
