"""Taking a result away from the Runs tab: real exports in a process of their own, and what the card says of them."""

import time
from pathlib import Path

import pytest
import torch

from engine import runs
from engine.models import load_model
from engine.runs import Run
from engine.sparse.attach import attach
from engine.spec import RunSpec
from sparse_ui.context import AppContext, Settings
from sparse_ui.tabs.takeaway import PLACE, default_folder, start_compose, start_export, view_takeaway

ENDS_S = 60.0


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    """A run with a delta, over weights in float32."""
    return _run(model_folder, tmp_path)


def _run(model: Path, root: Path, **fields: str) -> Run:
    names = {"model": str(model), "dataset": "demo/pirate", "method": "random", "dtype": "float32", "device": "cpu"}
    made = runs.create_run(RunSpec(**{**names, "output": str(root), **fields}))
    attach(load_model(runs.read_spec(made), torch.device("cpu")), runs.read_spec(made)).delta().save(made.delta_path)
    return made


def _context(run: Run) -> AppContext:
    return AppContext(Settings(run.path.parent))


def _answer(context: AppContext) -> str:
    deadline = time.monotonic() + ENDS_S
    while context.errands.busy() and time.monotonic() < deadline:
        time.sleep(0.1)
    return context.errands.show(PLACE)


def test_export_lands_beside_the_run_and_is_told_in_one_sentence(run: Run) -> None:
    context, target = _context(run), default_folder(run, "merged")
    assert f"Exporting {run.id}" in start_export(context, [run.id], "merged", "")
    assert view_takeaway(context, [run.id], "merged", None)[1]["interactive"] is False
    said = _answer(context)
    assert f"KiB in {target}." in said
    assert said.count("Merged model (float32): ") == 1
    assert (target / "model.safetensors").is_file()
    assert default_folder(run, "merged") == target.with_name(f"{target.name}-2")


def test_what_peft_has_no_place_for_is_the_engines_sentence(model_folder: Path, tmp_path: Path) -> None:
    run = _run(model_folder, tmp_path, targets="all")
    context, target = _context(run), tmp_path / "mine"
    start_export(context, [run.id], "peft", str(target))
    said = _answer(context)
    assert "reaches weights of nn.Linear layers only" in said
    assert "Error:" not in said
    assert not target.exists()


def test_results_added_are_a_run_and_a_second_errand_waits(run: Run, model_folder: Path) -> None:
    other, context = _run(model_folder, run.path.parent), _context(run)
    ids = [run.id, other.id]
    start_compose(context, ids)
    assert "One thing at a time: Adding 2 results is not done yet" in start_export(context, ids[:1], "peft", "")
    assert "entries in" in _answer(context)
    assert len(runs.list_runs(run.path.parent)) == 3


def test_export_is_offered_for_one_result_and_adding_for_several(run: Run, model_folder: Path) -> None:
    other, context = _run(model_folder, run.path.parent), _context(run)
    without = runs.create_run(runs.read_spec(run))
    offered = {1: [run.id], 2: [run.id, other.id], 3: [run.id, without.id], 4: [without.id]}
    views = {key: view_takeaway(context, ids, "merged", None) for key, ids in offered.items()}
    able = {key: (view[1]["interactive"], view[2]["interactive"]) for key, view in views.items()}
    assert able == {1: (True, False), 2: (False, True), 3: (False, False), 4: (False, False)}
