"""The command line as a person uses it: sentences, exit status, JSON; the demo in small; real models and data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import runs
from engine.__main__ import main
from engine.presets import bundled_models, list_presets
from engine.runs import RunStatus
from engine.spec import RunSpec

PROJECT = Path(__file__).resolve().parents[2]
SMALL = ["--set", "sequence_length=64", "--set", "max_steps=3", "--set", "gradient_accumulation=2"]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that is to fail before it trains; return what it says."""
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_density_of_five_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, "train", "demo", "--set", "density=5")
    assert said == "Error: density must be in (0, 1], got 5. For 5 percent write 0.05.\n"


def test_all_problems_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, "plan", "--set", "density=5", "--set", "dtpye=float32")
    assert "density must be in (0, 1], got 5." in said
    assert "Did you mean dtype?" in said
    assert "model is missing." in said


def test_unreachable_hub_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, "train", "--set", "model=Qwen/Qwen3-0.6B", "--set", "dataset=demo/pirate")
    assert (
        "The Hugging Face Hub did not answer within 3 s, and model 'Qwen/Qwen3-0.6B' is not on this computer." in said
    )


def test_model_folder_without_weights_plans_and_does_not_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(bundled_models()["demo"] / "config.json", folder)
    assert main(["plan", "--set", f"model={folder}"]) == 0
    said = _said(capsys, "train", "--set", f"model={folder}", "--set", "dataset=demo/pirate")
    assert "has a config.json but no weights (*.safetensors)" in said


def test_budget_that_is_too_small_names_need_budget_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, "train", "demo", "--set", "budget_gib=0.1")
    assert "This run needs about" in said
    assert "the budget is 102.4 MiB" in said
    assert "raise budget_gib" in said


def test_budget_beyond_every_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, "plan", "demo", "--set", "budget_gib=1e300")
    assert said == "Error: budget_gib must be in (0, 1000000], got 1e+300.\n"


def test_encoder_without_the_task_names_it(capsys: pytest.CaptureFixture[str], encoder_folder: Path) -> None:
    said = _said(capsys, "plan", "--set", f"model={encoder_folder}")
    assert f"is an encoder ({encoder_folder.name}), which reads a text from both sides and cannot go on" in said
    assert "Set task=classification" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--largest", "foo"],
            r"Argument --largest: invalid choice: 'foo' \(choose from .*\)\. `.* plan --help` says .*",
        ),
        (["--card", "-3"], r"The memory of a card must be above 0, as in '24 GiB', got '-3'\."),
        (["--card", ""], r"card must be one of .*, got ''\. Give its whole name, .*"),
        (["--set", "density=5"], r"density must be in \(0, 1\], got 5\. For 5 percent write 0\.05\."),
    ],
)
def test_what_plan_cannot_do_is_one_sentence_and_one_object(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "demo", *arguments, "--json"]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"Error: {sentence}\n", captured.err)
    assert re.fullmatch(sentence, json.loads(captured.out)["error"])


def test_an_unknown_preset_names_those_that_are_near(capsys: pytest.CaptureFixture[str]) -> None:
    near = _said(capsys, "plan", "qwen-3-8b")
    assert near.startswith("Error: There is no spec file or preset 'qwen-3-8b'. Did you mean qwen3-8b or ")
    assert near.endswith("? `python -m engine presets` lists them all.\n")
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.split() == [*list_presets()]


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m engine fields | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("model (required)\n", "")


def test_missing_dataset_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dataset is missing" in _said(capsys, "train", "--set", "model=demo")


def test_unknown_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no run 'nope'" in _said(capsys, "stop", "nope")


def test_a_folder_of_runs_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "There is no folder" in _said(capsys, "runs", "--runs", str(tmp_path / "nope"))


def test_what_a_failed_run_has_no_figure_of_is_a_dash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = runs.create_run(RunSpec(model="demo", dataset="demo/pirate", output=str(tmp_path)))
    runs.write_status(run, RunStatus("failed"))
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [run.id, "failed", "–", "–", "–", "–"]


def _train(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run `train --json` as a process; return its status, the object of its last line, and what it said."""
    command = [sys.executable, "-m", "engine", "train", *arguments, "--json"]
    environment = {"PYTHONPATH": str(PROJECT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_dataset_without_usable_column_fails_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    status, report, said = _train("--set", "model=demo", "--set", "dataset=odd.jsonl", *SMALL)
    assert status == 2  # there was no run yet
    assert report["state"] == "failed"
    assert "has no column to train on: found a, b." in report["error"]
    assert "Traceback" not in said


def test_rows_that_are_all_too_long_leave_no_run_and_are_refused_before_the_next(tmp_path: Path) -> None:
    row = {"question": "why " * 60, "answer": "because"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    for says_run in (True, False):
        status, report, said = _train("--set", "model=demo", "--set", "dataset=long.jsonl", *SMALL)
        assert (status, report["state"]) == (2, "failed")
        assert "too long" in report["error"]
        assert said.count("too long") == 1
        assert ("Run " in said) == says_run
        assert not list((tmp_path / "runs").glob("*/spec.yaml"))


def test_small_demo_learns_the_style_on_entities_it_never_saw() -> None:
    """The demo with a third of its steps and answers, at a rate that suits them."""
    arguments = ["max_steps=80", "learning_rate=0.001", "exact_match_rows=64", "evaluation_rows=64"]
    status, report, said = _train("demo", *(part for item in arguments for part in ("--set", item)))
    assert status == 0, said
    assert report["state"] == "finished"
    assert report["exact_match"]["base"] <= 0.05
    assert report["exact_match"]["tuned"] >= 0.9
    assert report["train_seconds"] > 0
    assert report["peak_bytes"] > 0
    assert "exact match" in said


@pytest.mark.parametrize("dataset", ["alpaca_en_demo.json", "wiki_demo.txt"])
def test_real_pretrained_model_learns_from_real_data(shared: Path, dataset: str) -> None:
    fields = {
        "model": shared / "models" / "stories260k",
        "dataset": shared / "data" / "llamafactory_demo" / dataset,
        "density": 0.05,
        "learning_rate": 0.002,
        "sequence_length": 128,
        "micro_batch_size": 8,
        "gradient_accumulation": 1,
        "max_steps": 40,
        "evaluation_interval": 0,
    }
    status, report, said = _train(*(part for name, value in fields.items() for part in ("--set", f"{name}={value}")))
    assert status == 0, said
    assert report["evaluation_loss"]["tuned"] < report["evaluation_loss"]["base"] - 0.3
    assert report["exact_match"] == {"base": None, "tuned": None}


def test_plan_for_a_gpu_that_is_not_here_takes_the_budget_for_its_memory(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.__main__.list_gpus", list)
    asked = ["plan", "--json", "--set", f"model={model_folder}", "--set", "device=cuda", "--set", "budget_gib=22.5"]
    assert main(asked) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["budget_bytes"]) == ("A card of 22.5 GiB", 22.5 * 2**30)
