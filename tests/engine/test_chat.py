"""The chat worker's model: that of the run, also where the run's GPU is not there for it."""

import io
from pathlib import Path

import pytest
import torch

from engine.chat import ChatModel
from engine.errors import RunError
from engine.events import EventWriter, ModelLoaded
from engine.export import export
from engine.hardware import Gpu
from engine.models import load_model
from engine.progress import chat_in_terminal
from engine.runs import Run, create_run, device_lock, run_lock
from engine.sparse.attach import attach
from engine.spec import RunSpec
from engine.units import GIB


@pytest.fixture
def tuned(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> Run:
    """A run over NF4 with `dtype: auto`, whose result is that of a GPU, where this is bf16."""
    names = {"model": str(model_folder), "dataset": str(dataset_folder), "output": str(tmp_path / "runs")}
    spec = RunSpec(**names, method="random", density=0.05, quantization="nf4")
    run = create_run(spec)
    computed = spec.model_copy(update={"dtype": "bfloat16"})
    attach(load_model(computed, torch.device("cpu")), computed).delta().save(run.delta_path)
    EventWriter(run.events_path).write(ModelLoaded(1, 1, 1, 1, "cuda:0", "bfloat16", 0.1))
    return run


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver answer for a card."""
    monkeypatch.setattr("engine.hardware.list_gpus", lambda: [Gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, None, 89)])


@pytest.mark.usefixtures("card")
def test_chat_leaves_a_gpu_that_is_taken_and_finds_on_the_cpu_what_it_quantised_in_bf16(tuned: Run) -> None:
    said = []
    asked = [{"role": "user", "content": "hello"}]
    with device_lock(tuned.path.parent, "cuda:0"):  # of a run, or of another chat
        chat = ChatModel(tuned)
    chat.answer("tuned", asked, lambda text, done: said.append(done), max_new_tokens=2, temperature=0.0)
    assert said[-1]


@pytest.mark.usefixtures("card")
def test_nf4_results_are_not_merged_on_a_gpu_where_a_run_is_at_work(tuned: Run, tmp_path: Path) -> None:
    with run_lock(tuned), pytest.raises(RunError, match=r"A run is at work on RTX 4090\. Wait for it to end\."):
        export(tuned, tmp_path / "merged", "merged")


@pytest.mark.parametrize(("last", "status"), [("hello", 0), ("so " * 900, 2)], ids=["answered", "refused"])
def test_in_a_terminal_a_refused_question_is_taken_back_and_the_next_one_is_asked(
    tuned: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: str, status: int
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n{'word ' * 900}\n/clear\n{last}\n"))
    assert chat_in_terminal(tuned) == status
    said = capsys.readouterr().out
    refused = 1 + (status == 2)
    assert said.count("Error: This chat is ") == refused
    answers = [line.split("base> ")[1] for line in said.splitlines() if " base> " in line]
    assert len(answers) == 3 - refused
    assert len(set(answers)) == 1  # what was cleared is not remembered
