"""Token ids that a model's table of embeddings lacks: padding takes another, rows with one are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engine.chat import ChatModel
from engine.data.batches import Question, evaluation_batches, prepare_data
from engine.data.row_counts import count_rows
from engine.errors import DatasetError, ModelError
from engine.evaluate import answer_questions
from engine.events import EventWriter, ModelLoaded
from engine.models import load_classifier, load_model, load_tokenizer
from engine.planner.row_lengths import why_refused
from engine.planner.shape import read_shape
from engine.planner.trace_worker import _count
from engine.runs import create_run
from engine.sparse.attach import attach
from engine.spec import RunSpec
from engine.workers import start_run

ROWS = 259  # of the table: 256 bytes and three special tokens
BEYOND = r"token ids up to 260 here, .* has 259 rows, for ids up to 258\. Give the model the tokenizer"


@pytest.fixture
def padded(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a padding token, and one more, that its tokenizer alone knows."""
    folder = tmp_path / "padded"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["[MORE]"])
    tokenizer.save_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("[MORE]")) == (ROWS, ROWS + 1)
    return folder


def _spec(model: Path, *questions: str, **fields: object) -> RunSpec:
    rows = model.parent / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": each, "answer": "Yes.", "label": number}) + "\n"
            for number, each in enumerate(questions)
        )
    )
    names = {"model": str(model), "dataset": str(rows), "output": str(model.parent / "runs"), "device": "cpu"}
    return RunSpec(**{**names, "dtype": "float32", "evaluation_fraction": 0, "sequence_length": 64, **fields})


def test_rows_are_padded_with_an_id_that_the_table_has(padded: Path) -> None:
    spec = _spec(padded, "Why?", "Why is the sky as blue as it is?", micro_batch_size=2)
    tokenizer = load_tokenizer(spec)
    (batch,) = evaluation_batches(prepare_data(spec, tokenizer).training, spec)
    assert not batch.attention_mask.all()
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {tokenizer.eos_token_id}


def test_questions_of_different_length_are_answered(padded: Path) -> None:
    spec = _spec(padded, "Why?")
    questions = [Question([5, 6], "short", "a"), Question([7, 8, 9, 10], "long", "b")]
    answers = answer_questions(load_model(spec, torch.device("cpu")), load_tokenizer(spec), questions)
    assert [answer.question for answer in answers] == ["short", "long"]


def test_a_classifier_that_decodes_knows_what_its_batches_are_padded_with(padded: Path) -> None:
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    spec = _spec(padded, "Why?", "Why is the sky so blue?", task="classification", columns={"text": "question"})
    data = prepare_data(spec, load_tokenizer(spec))
    assert data.labels is not None
    model, _ = load_classifier(spec, torch.device("cpu"), data.labels.names)
    assert model.config.pad_token_id == data.training.pad_id < ROWS  # type: ignore[union-attr]


def test_rows_with_ids_that_the_table_lacks_are_refused_before_a_run(padded: Path) -> None:
    spec = _spec(padded, "Why?", "Why [MORE]?")
    tokenizer = load_tokenizer(spec)
    for read in (lambda: prepare_data(spec, tokenizer), lambda: count_rows(spec, tokenizer, 100)):
        with pytest.raises(DatasetError, match=BEYOND):
            read()
    _count({"spec": spec.model_dump(mode="json")})  # as Setup does, while one looks
    with pytest.raises(DatasetError, match=BEYOND):
        start_run(spec)
    assert not (padded.parent / "runs").exists()
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS + 2}))
    assert not why_refused(spec)  # the model may have been given more rows


def test_a_chat_says_what_the_table_lacks_and_goes_on(padded: Path) -> None:
    spec = _spec(padded, "Why?", method="random", density=0.05)
    run = create_run(spec)
    attach(load_model(spec, torch.device("cpu")), spec).delta().save(run.delta_path)
    EventWriter(run.events_path).write(ModelLoaded(1, 1, 1, 1, "cpu", "float32", 0.1))
    chat, said = ChatModel(run), list[bool]()
    for question in ("Why [MORE]?", "Why?"):
        asked = [{"role": "user", "content": question}]
        arguments = ("tuned", asked, lambda text, done: said.append(done))
        if "MORE" in question:
            with pytest.raises(DatasetError, match=BEYOND):
                chat.answer(*arguments, max_new_tokens=2, temperature=0.0)
            assert not said
        else:
            chat.answer(*arguments, max_new_tokens=2, temperature=0.0)
    assert said[-1]


def test_the_table_is_that_of_the_weights_whatever_the_task(encoder_folder: Path, model_folder: Path) -> None:
    words = json.loads((encoder_folder / "config.json").read_text())["vocab_size"]
    assert read_shape(str(encoder_folder), task="classification").embedding_rows == words
    assert read_shape(str(model_folder), task="classification").embedding_rows == ROWS
    assert read_shape("demo").embedding_rows == load_model(RunSpec(model="demo"), torch.device("cpu")).vocab_size


def test_a_padding_id_of_the_config_that_the_table_lacks_is_said_in_a_sentence(
    model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "pad_token_id": ROWS}))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*[Pp]adding_idx"):
        load_model(RunSpec(model=str(tmp_path / "model")), torch.device("cpu"))
