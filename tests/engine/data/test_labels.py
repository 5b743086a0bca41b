"""Rows of classification: which columns and labels are found, how texts are encoded, and what is wrong with others."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from engine.data.batches import PreparedData, prepare_data
from engine.data.columns import UnusableRowError
from engine.data.formats import recognise
from engine.data.labels import Labels, read_labels, split_pair
from engine.data.preview import preview_dataset
from engine.data.sources import load_source
from engine.data.steps import step_batches
from engine.errors import DatasetError, HubUnreachableError
from engine.models import load_tokenizer
from engine.presets import list_presets, load_preset
from engine.spec import RunSpec

GLUE = {
    "cola": ("sentence", "label", "idx"),
    "sst2": ("sentence", "label", "idx"),
    "mrpc": ("sentence1", "sentence2", "label", "idx"),
    "stsb": ("sentence1", "sentence2", "label", "idx"),
    "qqp": ("question1", "question2", "label", "idx"),
    "mnli": ("premise", "hypothesis", "label", "idx"),
    "qnli": ("question", "sentence", "label", "idx"),
    "rte": ("sentence1", "sentence2", "label", "idx"),
}


def _spec(dataset: str = "x", **fields: Any) -> RunSpec:
    return RunSpec(model="demo", task="classification", dataset=dataset, **fields)


@pytest.mark.parametrize("name", GLUE)
def test_the_columns_of_glue_are_recognised(name: str) -> None:
    columns = GLUE[name]
    row = {column: 0 if column in ("label", "idx") else "words" for column in columns}
    found = recognise("glue", columns, [row], _spec())
    texts = dict(
        zip(("text", "text_pair"), [column for column in columns if column not in ("label", "idx")], strict=False)
    )
    assert found.columns == {**texts, "label": "label"}


def test_named_columns_are_taken() -> None:
    row = {"a": "x", "b": "y", "c": "z"}
    assert recognise("x", [*row], [row], _spec(columns={"text": "b", "label": "a"})).columns == {
        "text": "b",
        "label": "a",
    }
    with pytest.raises(
        DatasetError, match=r"no columns for classification rows: found a, b, c\..*\{text: a, label: c\}"
    ):
        recognise("x", [*row], [row], _spec())


def test_labelled_rows_for_a_causal_run_name_the_task() -> None:
    row = {"sentence1": "x", "sentence2": "y", "label": 1}
    with pytest.raises(DatasetError, match=r"Set task=classification for its labels, or name columns, for example"):
        recognise("x", [*row], [row], RunSpec(model="demo", dataset="x"))


def _rows(labels: list[Any], feature: Any = None) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})
    return rows.cast_column("label", feature) if feature else rows


def test_labels_are_classes_strings_whole_numbers_or_a_regression() -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    assert read_labels("x", _rows([1, 1], classes), "label").names == ("no", "yes")
    assert read_labels("x", _rows(["b", "a", "b"]), "label").names == ("a", "b")
    assert read_labels("x", _rows([2.0, 0.0]), "label").names == ("0", "2")
    assert read_labels("x", _rows([3.8, 1.0]), "label") == Labels()
    assert Labels(("0", "2"), (0.0, 2.0)).number_of(2) == 1


def test_numbers_as_text_are_numbers_and_an_empty_cell_is_no_label() -> None:
    """As a CSV file gives them, whose cells are all text."""
    assert read_labels("x", _rows(["3.8", "1", ""]), "label") == Labels()
    assert Labels().number_of("3.8") == 3.8
    assert read_labels("x", _rows(["10", " ", "9"]), "label").names == ("9", "10")
    with pytest.raises(UnusableRowError, match="no label"):
        Labels(("9", "10"), ("9", "10")).number_of("")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([-1, -1], r"every row holds -1, as unlabelled test parts do\. Set dataset_split"),
        ([None, None], "every row holds nothing"),
        ([1, 1], "has one label only, 1, and a classification needs two or more"),
        ([str(number) for number in range(1001)], "has 1,001 different labels, and at most 1,000"),
        ([["a"], ["b"]], "holds a list a row, and a label is a string or a number"),
    ],
)
def test_labels_that_cannot_be_used_say_why(labels: list[Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read_labels("x", _rows(labels), "label")


def test_a_line_may_hold_two_texts() -> None:
    assert split_pair("a ||| b") == ("a", "b")
    assert split_pair(" a ") == ("a", None)


def _prepare(encoder_folder: Path, dataset: str, **fields: Any) -> PreparedData:
    spec = RunSpec(model=str(encoder_folder), task="classification", dataset=dataset, **fields)
    return prepare_data(spec, load_tokenizer(spec))


def test_pairs_are_encoded_by_the_tokenizer_and_padded(encoder_folder: Path, pairs_folder: Path) -> None:
    spec = RunSpec(model=str(encoder_folder), task="classification", dataset=str(pairs_folder), micro_batch_size=8)
    data, tokenizer = prepare_data(spec, load_tokenizer(spec)), load_tokenizer(spec)
    batch = step_batches(data.training, spec, 1)[0]
    assert batch.labels.shape == (8,)
    assert batch.labelled_tokens == 8
    assert batch.segments is not None
    length = int(batch.attention_mask[0].sum())
    words = tokenizer.decode(batch.input_ids[0, :length])
    left, right = words.removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
    again = tokenizer(left, right)
    assert batch.input_ids[0, :length].tolist() == again["input_ids"]
    assert batch.segments[0, :length].tolist() == again["token_type_ids"]
    assert (data.summary.training_rows, data.summary.evaluation_rows, data.summary.labels) == (64, 16, ("cold", "warm"))


def test_long_texts_are_cut_longest_first(encoder_folder: Path, write: Any) -> None:
    rows = [{"text": "is " * 20, "text_pair": "red blue", "label": place % 2} for place in range(4)]
    data = _prepare(encoder_folder, write("train.jsonl", rows), sequence_length=10, evaluation_fraction=0)
    assert data.summary.dropped == {"cut": 4}
    assert len(data.training[0].input_ids) == 10
    assert data.training[0].input_ids[-3:].tolist() == [9, 11, 3]  # the second text is whole


def test_rows_without_a_label_are_dropped_and_counted(encoder_folder: Path, write: Any) -> None:
    rows = [{"text": "red", "label": label} for label in ("a", "b", None, "a")] + [{"text": "", "label": "b"}]
    data = _prepare(encoder_folder, write("train.jsonl", rows), evaluation_fraction=0)
    assert data.summary.dropped == {"no label": 1, "empty text": 1}


def test_an_unlabelled_held_out_part_says_so(encoder_folder: Path, write: Any, tmp_path: Path) -> None:
    write("set/train.jsonl", [{"text": "red", "label": place % 2} for place in range(4)])
    write("set/test.jsonl", [{"text": "red", "label": -1}])
    with pytest.raises(DatasetError, match=r"held-out part .* has no labelled row: of 1 rows, no label 1"):
        _prepare(encoder_folder, str(tmp_path / "set"))


def test_preview_shows_texts_and_labels(pairs_folder: Path) -> None:
    preview = preview_dataset(_spec(str(pairs_folder)), rows=2)
    assert (preview.format, preview.labels) == ("classification", Labels(("cold", "warm"), ("cold", "warm")))
    assert {row.word for row in preview.conversations} <= {"cold", "warm"}


def test_a_configuration_of_a_local_dataset_is_refused(pairs_folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"'mrpc' is for datasets on the Hub, and .* is on this computer"):
        load_source(_spec(str(pairs_folder), dataset_config="mrpc"))


def test_glue_offline_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    presets = [name for name in list_presets() if name.startswith("sift-roberta-large-")]
    assert len(presets) == 8
    for name in presets:
        with pytest.raises(HubUnreachableError, match=r"dataset 'nyu-mll/glue' is not on this computer\."):
            load_source(load_preset(name))
