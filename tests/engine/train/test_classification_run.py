"""A classification from start to end: in a worker, in the chat, merged, over a dense and over an NF4 base."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine import runs, workers
from engine.chat import HEADLESS
from engine.errors import DeltaError
from engine.events import DataPrepared, Evaluated, ModelLoaded
from engine.export import export_peft, merge
from engine.runs import Run
from engine.spec import RunSpec

pytestmark = [
    pytest.mark.parametrize("encoder_folder", ["bert"], indirect=True),
    pytest.mark.usefixtures("forked"),
    pytest.mark.xdist_group("forked"),
]


@pytest.fixture
def finished(
    request: pytest.FixtureRequest,
    encoder_folder: Path,
    pairs_folder: Path,
    tmp_path: Path,
) -> Iterator[Run]:
    fields: dict[str, Any] = getattr(request, "param", {})
    values = {"task": "classification", "sequence_length": 32, "max_steps": 30, "learning_rate": 1e-2, "density": 0.2}
    values |= {"micro_batch_size": 16, "gradient_accumulation": 1, "evaluation_interval": 15, "probe_interval": 15}
    values |= {"model": str(encoder_folder), "dataset": str(pairs_folder), "output": str(tmp_path / "runs")}
    run = runs.create_run(RunSpec(**{**values, **fields}))
    workers.start_worker(run)
    deadline = time.monotonic() + 90
    while runs.has_worker(run) or runs.read_status(run).is_live:
        assert time.monotonic() < deadline, runs.log_tail(run)
        time.sleep(0.05)
    yield run
    if runs.has_worker(run):
        os.killpg(runs.read_status(run).pid, signal.SIGKILL)


def test_a_run_tells_its_metrics_answers_and_can_be_merged(finished: Run, tmp_path: Path) -> None:
    assert runs.read_status(finished).state == "finished", runs.log_tail(finished)
    events = [record.event for record in runs.read_events(finished)[0]]
    data, loaded = (next(event for event in events if isinstance(event, kind)) for kind in (DataPrepared, ModelLoaded))
    assert data.labels == ("cold", "warm")
    assert loaded.head_numel == 2 * 32 + 2
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 15, 30]
    report = runs.read_report(finished)
    assert report["metrics"]["tuned"]["accuracy"] == 1.0 > report["metrics"]["base"]["accuracy"]
    assert report["exact_match"] == {"base": None, "tuned": None}
    _check_chat(finished)
    merge(finished, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("is it", "red", return_tensors="pt")
    with torch.no_grad():
        assert model.config.id2label[int(model(**tokens).logits.argmax())] == "warm"
    with pytest.raises(DeltaError, match=r"no place for the head .* Export it merged instead"):
        export_peft(finished, tmp_path / "adapter")


def _check_chat(run: Run) -> None:
    chat = workers.start_chat(run)
    try:
        asked = [{"role": "user", "content": "is it not ||| red"}]
        said = {chunk.side: chunk.text for chunk in chat.stream({"base": asked, "tuned": asked})}
    finally:
        chat.close()
    assert said["base"] == HEADLESS
    assert said["tuned"].startswith("warm ")
    assert said["tuned"].count("%") == 2


@pytest.mark.parametrize("finished", [{"quantization": "nf4", "method": "spiel-ag"}], indirect=True)
def test_the_head_stays_dense_over_an_nf4_base(finished: Run) -> None:
    pytest.importorskip("bitsandbytes")
    assert runs.read_status(finished).state == "finished", runs.log_tail(finished)
    assert runs.read_report(finished)["head_parameters"] == 2 * 32 + 2
    info = json.loads((finished.delta_path / "delta.json").read_text())
    assert (info["quantization"], info["labels"]) == ("nf4", ["cold", "warm"])
