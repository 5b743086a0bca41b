"""Labelled texts as the model sees them: ids of a text or a pair, which text each token belongs to, and the label.

Pairs go through the tokenizer's own encoding of pairs, so that separators and segments are those of the pre-training.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from engine.data.examples import lengths_of
from engine.data.labels import LabelledText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledExample:
    """One row. `input_ids`: (tokens,) int32; `segments`: (tokens,) uint8, 1 in the second text.

    `segments` is empty where the model knows none. `label`: the class number, or the number of a regression.
    """

    input_ids: NDArray[np.int32]
    segments: NDArray[np.uint8]
    label: float


class LabelledExamples(Sequence[LabelledExample]):
    """A sequence of labelled examples in flat arrays; see `Examples`. `pad_id` fills up short rows of a batch."""

    def __init__(self, examples: Sequence[LabelledExample] = (), pad_id: int = 0) -> None:
        self.pad_id = pad_id
        self._ids = array("i")
        self._segments = bytearray()  # empty where the model knows none
        self._ends = array("q")
        self._labels = array("d")
        for example in examples:
            self.append(example)

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return len(self._ids)

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples; -1 where there are none."""
        return int(np.asarray(self._ids, dtype=np.int32).max(initial=-1))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (examples,)."""
        return lengths_of(self._ends)

    @property
    def labelled_tokens(self) -> int:
        """Labels that a model predicts: one a row."""
        return len(self._labels)

    def append(self, example: LabelledExample) -> None:
        """Add one example at the end."""
        self._ids.frombytes(np.ascontiguousarray(example.input_ids, dtype=np.int32).tobytes())
        self._segments += example.segments.tobytes()
        self._ends.append(len(self._ids))
        self._labels.append(example.label)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> LabelledExample: ...

    @overload
    def __getitem__(self, index: slice) -> "LabelledExamples": ...

    def __getitem__(self, index: int | slice) -> "LabelledExample | LabelledExamples":
        if isinstance(index, slice):
            return LabelledExamples([self[place] for place in range(*index.indices(len(self)))], self.pad_id)
        place = range(len(self))[index]
        start, end = (self._ends[place - 1] if place else 0), self._ends[place]
        return LabelledExample(
            np.frombuffer(self._ids[start:end], dtype=np.int32),
            np.frombuffer(bytes(self._segments[start:end]), dtype=np.uint8),
            self._labels[place],
        )


@dataclass(frozen=True)
class EncodedText:
    """The ids of a text or a pair, its segments (empty where the model knows none), and whether it was cut."""

    input_ids: list[int]
    segments: list[int]
    cut: bool


def encode_texts(
    texts: Sequence[tuple[str, str | None]], tokenizer: "PreTrainedTokenizerBase", sequence_length: int
) -> list[EncodedText]:
    """Return texts or pairs tokenised, the longer of a pair cut first. All are pairs, or none is.

    Args:
        texts: one or two texts each.
        tokenizer: of the base model.
        sequence_length: most tokens, special ones included; never more than the tokenizer's own limit.
    """
    if not texts:
        return []
    pairs = [pair for _, pair in texts if pair is not None]
    options: dict[str, Any] = {"truncation": True, "max_length": min(sequence_length, tokenizer.model_max_length)}
    encoded = tokenizer([text for text, _ in texts], pairs or None, **options)
    segments = encoded.get("token_type_ids") or [[]] * len(texts)
    cut = [bool(each.overflowing) for each in encoded.encodings or []] or [False] * len(texts)
    return [EncodedText(*each) for each in zip(encoded["input_ids"], segments, cut, strict=True)]


def encode_labelled(
    rows: Sequence[LabelledText], tokenizer: "PreTrainedTokenizerBase", sequence_length: int
) -> list[tuple[LabelledExample, bool]]:
    """Return the example of each row, and whether it was cut; see `encode_texts`."""
    encoded = encode_texts([(row.text, row.text_pair) for row in rows], tokenizer, sequence_length)
    return [
        (
            LabelledExample(np.array(each.input_ids, np.int32), np.array(each.segments, np.uint8), row.label),
            each.cut,
        )
        for row, each in zip(rows, encoded, strict=True)
    ]
