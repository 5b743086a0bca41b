"""Rows of classification: one or two texts and a label. Never torch.

Labels are the classes that a dataset names (a Hub dataset's ClassLabel), the strings or whole numbers that its rows to
train on hold, or, where they are numbers with a fraction, targets of a regression, as in STS-B. Cells of a CSV file are
text: an empty one is no label, and one that reads as a number is that number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from engine.data.columns import UnusableRowError, cell_text, named
from engine.errors import DatasetError
from engine.spec import Role

if TYPE_CHECKING:
    import datasets

LABEL_NAMES = ("label", "labels", "class", "category", "target", "score")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "answer"),
    ("query", "document"),
    ("text", "text_pair"),
    ("text1", "text2"),
)
TEXT_NAMES = ("sentence", "text", "content", "document", "review", "question", "title")
MOST_LABELS = 1000
HEAD_ROWS = 20  # whose labels show whether they are strings or numbers
UNLABELLED = -1  # the Hub's GLUE marks the rows of its test parts so
PAIR_SEPARATOR = "|||"  # between two texts that a person types in one line


@dataclass(frozen=True)
class Labels:
    """The labels of a dataset. `names` by class number, empty for a regression; `values`: the cells that mean them."""

    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()

    def number_of(self, value: Any) -> float:
        """Return the class number of a cell, or, of a regression, the number itself.

        Raises:
            UnusableRowError: there is no label, or none that the rows to train on have.
        """
        if _is_empty(value):
            raise UnusableRowError("no label")
        if self.names:
            if value in self.values:
                return self.values.index(value)
            raise UnusableRowError("no label" if value == UNLABELLED else "unknown label")
        if (number := _number(value)) is not None:
            return number
        raise UnusableRowError("no label")

    def word_of(self, number: float) -> str:
        """Return the name of a class, or the number of a regression."""
        return self.names[int(number)] if self.names else f"{number:.3g}"


@dataclass(frozen=True)
class LabelledText:
    """What one row says. `text_pair` is None where there is one text; `label`: class number or number; `word`: it."""

    text: str
    text_pair: str | None
    label: float
    word: str

    @property
    def line(self) -> str:
        """Both texts in one line, as a person types them."""
        return self.text if self.text_pair is None else f"{self.text} {PAIR_SEPARATOR} {self.text_pair}"


def split_pair(line: str) -> tuple[str, str | None]:
    """Return the two texts of a line, or the one and None."""
    text, sign, pair = line.partition(PAIR_SEPARATOR)
    return text.strip(), pair.strip() if sign else None


def find_labelled(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[Role, str]
) -> dict[Role, str] | None:
    """Return the columns of text, text_pair and label; None where a text or the label is not to be found.

    Args:
        columns: all columns of a dataset.
        rows: its first rows.
        given: columns by role, as a person named them.
    """
    label = given.get("label") or next(iter(named(LABEL_NAMES, columns, [*given.values()])), None)
    if label is None:
        return None
    strings = [column for column in columns if column != label and any(isinstance(row[column], str) for row in rows)]
    if "text" in given:
        chosen: dict[Role, str] = {**given, "label": label}
        return chosen
    for names in PAIRS:
        found = [next(iter(named([name], strings)), None) for name in names]
        if found[0] and found[1]:
            return {"text": found[0], "text_pair": given.get("text_pair", found[1]), "label": label}
    text = next(iter([*named(TEXT_NAMES, strings), *(strings if len(strings) == 1 else [])]), None)
    return {"text": text, "label": label} if text else None


def read_labels(name: str, rows: "datasets.Dataset", column: str) -> Labels:
    """Return the labels of the rows to train on.

    Args:
        name: of the dataset, for the message.
        rows: to train on.
        column: of the label.

    Raises:
        DatasetError: there are no labels, one alone, or too many to be classes.
    """
    named_classes = getattr(rows.features[column], "names", None)
    if other := [value for value in rows.take(HEAD_ROWS)[column] if not isinstance(value, (str, int, float, NoneType))]:
        raise DatasetError(
            f"Column {column!r} of dataset {name!r} holds a {type(other[0]).__name__} a row, and a label is a string "
            "or a number. Name another: columns={label: ...}."
        )
    found = [value for value in rows.unique(column) if not _is_empty(value)]
    if not found or set(found) == {UNLABELLED}:
        raise DatasetError(
            f"Dataset {name!r} has no labels in column {column!r}: every row holds "
            f"{'-1' if found else 'nothing'}, as unlabelled test parts do. Set dataset_split to a labelled part."
        )
    if named_classes:
        return Labels(tuple(named_classes), tuple(range(len(named_classes))))
    numbers = {value: _number(value) for value in found}
    if None not in numbers.values() and any(number % 1 for number in numbers.values() if number is not None):
        return Labels()
    if len(found) == 1:
        raise DatasetError(
            f"Column {column!r} of dataset {name!r} has one label only, {found[0]!r}, and a classification needs two "
            "or more. Give rows of another label too."
        )
    if len(found) > MOST_LABELS:
        raise DatasetError(
            f"Column {column!r} of dataset {name!r} has {len(found):,} different labels, and at most {MOST_LABELS:,} "
            "can be told apart. Name another: columns={label: ...}."
        )
    values = sorted(found, key=lambda value: (numbers[value] is None, numbers[value] or 0.0, str(value)))
    return Labels(tuple(_word(value) for value in values), tuple(values))


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _number(value: Any) -> float | None:
    """Return the number that a cell is, or, as text, reads as; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def read_labelled(row: Mapping[str, Any], columns: Mapping[Role, str], labels: Labels) -> LabelledText:
    """Return what a row says.

    Raises:
        UnusableRowError: it has no text, or no label.
    """
    text = cell_text(row[columns["text"]]).strip()
    pair = cell_text(row[columns["text_pair"]]).strip() if "text_pair" in columns else None
    if not text or pair == "":
        raise UnusableRowError("empty text")
    number = labels.number_of(row[columns["label"]])
    return LabelledText(text, pair, number, labels.word_of(number))
