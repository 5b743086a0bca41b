"""When active entries were chosen, against a record of every step; what is said of it."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine import runs
from engine.__main__ import main
from engine.analysis.ages import Births, ages_findings, birth_step, read_births
from engine.data.batches import prepare_data
from engine.errors import RunError
from engine.events import Event, Selected, Stepped
from engine.models import load_model, load_tokenizer
from engine.runs import Run
from engine.sparse.attach import SparseTuning
from engine.spec import RunSpec
from engine.train.checkpoint import Progress, save_checkpoint
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

STEPS = 15
MOVING = {
    "spiel-ag": {"method": "spiel-ag", "period": 4, "estimation_steps": 2, "initial_rate": 0.5},
    "spiel-ma": {"method": "spiel-ma", "period": 3, "estimation_steps": 1, "initial_rate": 0.5, "learning_rate": 0.05},
    "sift": {"method": "sift", "reselection_period": 5},
}


class _NeverAsked:
    def stop_requested(self) -> bool:
        return False

    def checkpoint_requested(self) -> bool:
        return False


@pytest.fixture
def spec(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> RunSpec:
    fields = {"max_steps": STEPS, "gradient_accumulation": 1, "sequence_length": 48, "density": 0.02}
    return RunSpec(model=str(model_folder), dataset=str(dataset_folder), output=str(tmp_path), **fields)


def _trained(spec: RunSpec) -> tuple[Run, list[dict[str, set[int]]], list[Event]]:
    """Train in this process; return the run with its checkpoint, the positions after each step, and the events."""
    tokenizer, device = load_tokenizer(spec), torch.device("cpu")
    model = load_model(spec, device)
    tuning = start_tuning(model, spec)
    assert isinstance(tuning, SparseTuning)
    seen: list[dict[str, set[int]]] = []
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Stepped):
            seen.append({entry.name: {*entry.placed.tolist()} for entry in tuning.entries})

    optimizer, data = tuning.make_optimizer(), prepare_data(spec, tokenizer)
    meter = MemoryMeter(device)
    trainer = Trainer(spec, model, tokenizer, data, tuning, optimizer, emit, _NeverAsked(), lambda _: None, meter)
    assert trainer.run()
    run = runs.create_run(spec)
    save_checkpoint(run.checkpoints_path, tuning, optimizer, Progress(STEPS, 1.0, 0))
    return run, seen, events


def _birth(seen: list[dict[str, set[int]]], name: str, position: int) -> int:
    """Return the step after which a position has been active without a break."""
    return STEPS + 1 - sum(1 for _ in itertools.takewhile(lambda active: position in active[name], reversed(seen)))


@pytest.mark.parametrize("method", list(MOVING))
def test_births_are_those_of_a_record_of_every_step(spec: RunSpec, method: str) -> None:
    run, seen, events = _trained(spec.model_copy(update=MOVING[method]))
    expected = Counter(_birth(seen, name, position) for name, active in seen[-1].items() for position in active)
    first = MOVING[method].get("estimation_steps", 1)
    kept = sum(expected.pop(step, 0) for step in range(1, first + 1))
    births = read_births(run)
    chosen = [event for event in events if isinstance(event, Selected)]
    assert births.born == {**({first: kept} if kept else {}), **expected}
    assert births.num_active == chosen[-1].num_active
    assert births.born[chosen[-1].step] == chosen[-1].replaced
    assert len(births.born) > 2


def test_before_the_first_reselection_all_entries_are_those_of_the_start() -> None:
    spec = RunSpec(model="demo", method="spiel-ag")
    assert birth_step(spec, step=4, number=4) == 0
    assert birth_step(spec, step=5, number=5) == 5
    assert birth_step(spec, step=30, number=10) == 25
    assert birth_step(spec.model_copy(update={"method": "spiel-ma"}), step=30, number=2) == 25


def test_shares_are_told() -> None:
    findings = ages_findings({"a": Births("a", "spiel-ag", 100, {5: 60, 25: 10, 45: 10, 85: 20})})
    assert [row[1] for row in findings.rows] == ["60.0 %", "10.0 %", "10.0 %", "0.0 %", "20.0 %", "100"]
    assert "60.0 % of the 100 active entries go back to the first choice (step 5)" in findings.sentence
    assert "20.0 % were chosen in the second half of the steps." in findings.sentence


def test_runs_whose_entries_stay_and_runs_without_checkpoint_are_said(spec: RunSpec) -> None:
    fixed = runs.create_run(spec)
    with pytest.raises(RunError, match="stay as sift chose them"):
        read_births(fixed)
    young = runs.create_run(spec.model_copy(update={"method": "spiel-ma"}))
    with pytest.raises(RunError, match=r"has no checkpoint yet: it is queued\."):
        read_births(young)
    (young.checkpoints_path / "3").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be read"):
        read_births(young)


def test_command_compares_runs(spec: RunSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [_trained(spec.model_copy(update=MOVING[method]))[0] for method in ("spiel-ag", "spiel-ma")]
    ids = [run.id for run in found]
    assert main(["analyse", "ages", *ids, "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(f"In {name} (" in said for name in ids)
    assert (tmp_path / "out" / "analysis.html").exists()
