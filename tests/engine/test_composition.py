"""Results of several runs added: a run that chat and export take like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import runs
from engine.__main__ import main
from engine.chat import ChatModel
from engine.models import load_model
from engine.runs import Run, create_run, read_report, read_spec, write_json
from engine.sparse.attach import attach
from engine.sparse.delta import SparseDelta
from engine.spec import RunSpec

Make = Callable[..., Run]
CPU = torch.device("cpu")
FIGURES = {"peak_bytes": 1, "evaluation_loss": {"base": 5.5, "tuned": 4.25}, "exact_match": {"base": 0.0, "tuned": 0.5}}


@pytest.fixture
def make(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> Make:
    """Make a run with a delta of random values and a report."""

    def create(seed: int, **fields: Any) -> Run:
        names = {"model": str(model_folder), "dataset": str(dataset_folder), "output": str(tmp_path / "runs")}
        values = {"method": "random", "density": 0.05, "dtype": "float32", "device": "cpu", "exact_match_rows": 4}
        run = create_run(RunSpec(**{**names, **values, "seed": seed, **fields}))
        tuning = attach(load_model(read_spec(run), CPU), read_spec(run))
        with torch.no_grad():
            for entry in tuning.entries:
                entry.values.normal_(std=0.05)
        tuning.delta().save(run.delta_path)
        write_json(run.path / "report.json", FIGURES)
        return run

    return create


def _composed(tmp_path: Path, *arguments: str) -> Run:
    before = set(runs.list_runs(tmp_path / "runs"))
    assert main(["compose", *arguments, "--runs", str(tmp_path / "runs")]) == 0
    (new,) = set(runs.list_runs(tmp_path / "runs")) - before
    return new


def test_sum_of_two_runs_is_a_run_that_exports_to_the_sum_of_their_changes(make: Make, tmp_path: Path) -> None:
    first, second = make(1), make(2)
    run = _composed(tmp_path, first.id, second.id, "--scales", "1", "0.5")
    base = dict(load_model(read_spec(first), CPU).named_parameters())
    expected = {name: weight.detach().clone() for name, weight in base.items()}
    for source, factor in ((first, 1.0), (second, 0.5)):
        for name, (indices, values) in SparseDelta.load(source.delta_path).tensors.items():
            expected[name].view(-1)[indices.long()] += factor * values
    assert main(["export", str(run.path), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], atol=1e-6, rtol=0)
    assert ChatModel(run) is not None
    assert runs.read_status(run).state == "finished"
    assert main(["runs", "--runs", str(tmp_path / "runs")]) == 0


def test_overlap_and_figures_of_the_sum_are_said(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make(1), make(2)
    run = _composed(tmp_path, first.id, second.id, "--evaluate")
    said, card = capsys.readouterr().out, (run.delta_path / "README.md").read_text()
    part = read_report(run)["composed_of"][1]
    assert (part["run"], part["scale"], part["loss"][:2]) == (second.id, 1.0, [5.5, 4.25])
    assert 0 < part["loss"][2] < 20
    for text in (said, card):
        assert f"{first.id} and {second.id} share" in text
        assert "exact match: base 0.00, own result 0.50, sum 0.00" in text


def test_runs_over_other_weights_and_one_run_alone_are_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = make(1), make(2, targets="attention")
    root = ["--runs", str(tmp_path / "runs")]
    assert main(["compose", first.id, other.id, *root]) == 2
    assert "do not change the same weights of the same base" in capsys.readouterr().err
    assert main(["compose", first.id, *root]) == 2
    assert "takes two runs or more and a scale for each, got 1 and 1" in capsys.readouterr().err
    assert len(runs.list_runs(tmp_path / "runs")) == 2
