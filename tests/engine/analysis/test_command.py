"""`analyse` as a person uses it: files, table, sentence; what was asked wrongly."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from engine import workers
from engine.__main__ import main
from engine.hardware import Gpu
from engine.runs import device_lock
from engine.units import GIB

_PROGRAM = "import json; print(json.dumps({'error': 'The weights are odd.'}))"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(model_folder: Path, dataset_folder: Path) -> list[str]:
    fields = {"model": model_folder, "dataset": dataset_folder, "sequence_length": 48, "micro_batch_size": 2}
    return [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


def _check_page(folder: Path) -> dict[str, Any]:
    """Return analysis.json after a look at the page: whole, self-contained, its figures ones that plotly takes."""
    body: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    page = (folder / "analysis.html").read_text()
    assert body["sentence"].replace("'", "&#x27;") in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    for plot in body["plots"]:
        figure = go.Figure(plot["figure"])
        assert figure.data
        assert figure.layout.yaxis.title.text
    return body


def test_gradients_are_measured_and_reported(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyse", "gradients", *small, "--batches", "2", "--out", str(tmp_path / "a"), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    body = _check_page(tmp_path / "a")
    overall = body["result"]["pretrained"]["overall"]
    assert last["sentence"] == body["sentence"]
    assert f"{100 * overall['own'][0]:.1f} %" in body["sentence"]
    assert len(overall["first"]) == len(overall["own"]) == 2
    assert sum(overall["histogram"]) + overall["zeros"] == overall["numel"]
    assert body["spec"]["micro_batch_size"] == 2


def test_landscape_is_measured_and_reported(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "landscape", *small, "--line", "5", "--grid", "3", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    body = _check_page(next(Path("analyses").iterdir()))
    assert body["sentence"] in said
    assert body["result"]["alphas"] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert f"{body['result']['line'][3]:.3f} at the model" in body["sentence"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gradients", "--set", "model=demo"], "dataset is missing"),
        (["gradients", "demo", "--set", "quantization=nf4"], "got quantization=nf4. Set quantization=none."),
        (["gradients", "demo", "--set", "task=classification"], "got task=classification. Leave task away"),
        (["landscape", "demo", "--set", "budget_gib=0.1"], "and the budget is 102.4 MiB"),
        (["landscape", "demo", "--out", "taken"], "--out must be a new or empty folder, got 'taken'"),
        (["gradients", "demo", "--set", "density=5"], "density must be in (0, 1], got 5."),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken", "file").touch()
    assert main(["analyse", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("analyses").exists()


def test_counts_must_be_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "gradients", "demo", "--batches", "0"]) == 2
    assert "must be a whole number of at least 1, got '0'" in capsys.readouterr().err
    assert main(["analyse", "landscape", "demo", "--grid", "99999999"]) == 2
    assert "must be at most 500, got '99999999'" in capsys.readouterr().err


def test_error_in_the_worker_is_said_and_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    monkeypatch.setattr(workers, "command_of", lambda _name, folder: [sys.executable, "-c", _PROGRAM, folder])
    assert main(["analyse", "gradients", "--set", f"model={model_folder}", "--set", "dataset=odd.jsonl"]) == 2
    assert "The weights are odd." in capsys.readouterr().err
    assert not any(Path("analyses").iterdir())


def test_death_of_the_worker_is_said_with_its_log(
    monkeypatch: pytest.MonkeyPatch, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "command_of", lambda _name, _folder: [sys.executable, "-c", "raise SystemExit(3)"])
    assert main(["analyse", "gradients", *small, "--out", "here"]) == 2
    assert "The analysis process ended before its result; " in capsys.readouterr().err
    assert Path("here", "output.log").exists()


@pytest.mark.parametrize("kind", ["gradients", "landscape", "density"])
def test_a_gpu_that_a_chat_has_is_not_looked_into(
    kind: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("engine.hardware", "engine.planner.plan"):
        monkeypatch.setattr(f"{module}.list_gpus", lambda: [Gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, None, 89)])
    command = ["analyse", kind, *small, "--set", f"output={tmp_path}/runs", "--out", str(tmp_path / "a")]
    with device_lock(tmp_path / "runs", "cuda:0"):
        assert main(command) == 2
    assert "A chat or a measurement is at work on RTX 4090. Close it" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
