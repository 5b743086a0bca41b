"""Order, padding, counts and questions of the prepared data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.batches import evaluation_batches, prepare_data
from engine.data.examples import IGNORED, Example, Examples
from engine.data.steps import step_batches, steps_in_run
from engine.errors import DatasetError
from engine.spec import RunSpec

DEMO_FILES = {
    "alpaca_en_demo.json": "instruction",
    "alpaca_zh_demo.json": "instruction",
    "identity.json": "instruction",
    "glaive_toolcall_en_demo.json": "messages",
    "v1_sft_demo.jsonl": "messages",
    "c4_demo.jsonl": "text",
    "wiki_demo.txt": "text",
}


def spec(**fields: Any) -> RunSpec:
    return RunSpec(**{"model": "demo", "micro_batch_size": 2, "gradient_accumulation": 3, **fields})


def numbered(count: int) -> Examples:
    """Examples that begin with their own number and have one to three further tokens, the last one labelled."""
    rows = [np.array([number] + [99] * (1 + number % 3), np.int32) for number in range(count)]
    return Examples([Example(row, np.append(np.full(len(row) - 1, IGNORED), row[-1])) for row in rows], pad_id=7)


def numbers(examples: Examples, run: RunSpec, step: int) -> list[int]:
    return [int(number) for batch in step_batches(examples, run, step) for number in batch.input_ids[:, 0]]


def test_examples_come_back_as_they_went_in() -> None:
    row = Example(np.array([5, 6, 7], np.int32), np.array([IGNORED, 6, IGNORED], np.int32))
    (back,) = Examples([row])
    assert (back.input_ids.tolist(), back.labels.tolist()) == ([5, 6, 7], [IGNORED, 6, IGNORED])


def test_each_row_is_seen_once_an_epoch_across_step_borders() -> None:
    examples, run = numbered(10), spec(seed=3)
    seen = [number for step in range(1, 6) for number in numbers(examples, run, step)]
    epochs = [seen[start : start + 10] for start in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_step_alone_is_the_step_in_sequence() -> None:
    examples, run = numbered(10), spec(seed=3)
    sequence = [numbers(examples, run, step) for step in range(1, 8)]
    assert [numbers(numbered(10), run, step) for step in (7, 2)] == [sequence[6], sequence[1]]


def test_the_order_hangs_on_the_seed() -> None:
    assert numbers(numbered(50), spec(seed=1), 1) != numbers(numbered(50), spec(seed=2), 1)


def test_a_step_may_hold_more_rows_than_there_are() -> None:
    assert sorted(numbers(numbered(2), spec(), 1)) == [0, 0, 0, 1, 1, 1]


def test_the_effective_batch_does_not_hang_on_its_division() -> None:
    wide, narrow = spec(micro_batch_size=6, gradient_accumulation=1), spec(micro_batch_size=1, gradient_accumulation=6)
    assert numbers(numbered(10), wide, 2) == numbers(numbered(10), narrow, 2)


def test_short_rows_are_filled_up_and_masked() -> None:
    (batch,) = evaluation_batches(numbered(2), spec())
    assert batch.input_ids.tolist() == [[0, 99, 7], [1, 99, 99]]
    assert batch.labels.tolist() == [[IGNORED, 99, IGNORED], [IGNORED, IGNORED, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.input_ids.dtype == torch.int64


def test_labelled_tokens_are_those_with_something_before_them() -> None:
    rows = [Example(ids, ids) for ids in (np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32))]
    (batch,) = evaluation_batches(rows, spec())
    assert batch.labelled_tokens == 3 + 1


def test_evaluation_sees_every_row_in_order() -> None:
    batches = [*evaluation_batches(numbered(5), spec())]
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]
    assert [int(number) for batch in batches for number in batch.input_ids[:, 0]] == list(range(5))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 2), ({"epochs": 3}, 5), ({"epochs": 0.01}, 1), ({"max_steps": 9, "epochs": 3}, 9), ({"epochs": 1.2}, 2)],
)
def test_steps_cover_the_epochs(fields: dict[str, Any], expected: int) -> None:
    assert steps_in_run(10, spec(**fields)) == expected


def test_prepared_data_counts_what_it_left_out(write: Any, chatml: Any) -> None:
    rows = [{"question": "What?", "answer": answer} for answer in ("the blue", "", "the blue " * 40)]
    path = write("a.jsonl", [*rows, {"question": "What? " * 40, "answer": "x"}])
    prepared = prepare_data(spec(dataset=path, evaluation_fraction=0, sequence_length=64), chatml)
    assert prepared.summary.dropped == {"empty answer": 1, "cut": 1, "too long": 1}
    assert (prepared.summary.rows, prepared.summary.training_rows, len(prepared.evaluation)) == (4, 2, 0)
    assert prepared.summary.labelled_tokens == sum(example.labelled_tokens for example in prepared.training)


def test_questions_are_held_out_rows(write: Any, chatml: Any) -> None:
    rows = [{"question": f"Who is {number}?", "answer": f"the {number} "} for number in range(40)]
    path = write("a.jsonl", rows)
    prepared = prepare_data(spec(dataset=path, evaluation_fraction=0.25, exact_match_rows=4, evaluation_rows=6), chatml)
    assert (len(prepared.questions), len(prepared.evaluation), len(prepared.training)) == (4, 6, 30)
    question = prepared.questions[0]
    assert chatml.decode(question.prompt_ids) == f"<|user|>\n{question.question}<|end|>\n<|assistant|>\n"
    assert question.expected == question.question.replace("Who is", "the").rstrip("?")
    seen = {chatml.decode(example.input_ids) for example in prepared.training}
    assert not any(item.question in text for item in prepared.questions for text in seen)


def test_texts_have_no_questions(write: Any, bare: Any) -> None:
    path = write("a.jsonl", [{"text": f"the blue {number}"} for number in range(9)])
    prepared = prepare_data(spec(dataset=path, exact_match_rows=3), bare)
    assert (prepared.questions, prepared.summary.template) == ([], "none (plain text)")


def test_progress_reaches_the_end(write: Any, bare: Any) -> None:
    path, told = write("a.jsonl", [{"text": "the"} for _ in range(600)]), list[tuple[int, int]]()
    prepare_data(spec(dataset=path, evaluation_fraction=0), bare, lambda done, total: told.append((done, total)))
    assert told[-1] == (600, 600)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": ""}, r"no row to train on: of 2 rows, empty answer 2\. Name its columns\."),
        ({"question": "q" * 99, "answer": "a"}, r"no row to train on: of 2 rows, too long 2\. Raise sequence_length\."),
    ],
)
def test_a_dataset_without_usable_rows_is_refused(write: Any, chatml: Any, row: dict[str, str], message: str) -> None:
    path = write("a.jsonl", [row, row])
    with pytest.raises(DatasetError, match=message):
        prepare_data(spec(dataset=path, evaluation_fraction=0, sequence_length=32), chatml)


@pytest.mark.parametrize(("name", "kind"), DEMO_FILES.items())
def test_the_demo_files_of_other_trainers_load(shared: Path, chatml: Any, name: str, kind: str) -> None:
    path = shared / "data" / "llamafactory_demo" / name
    asked = spec(dataset=str(path), dataset_split="train[:24]", exact_match_rows=1, sequence_length=8192)
    prepared = prepare_data(asked, chatml)
    assert (prepared.summary.format, len(prepared.questions)) == (kind, 0 if kind == "text" else 1)
    assert all(example.labelled_tokens for example in prepared.training)
