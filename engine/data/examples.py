"""Tokenised rows, held compactly: five bytes a token, whatever the number of rows."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that carries no loss: torch.nn.CrossEntropyLoss, ignore_index


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. Labels are not shifted; the model shifts them.

    `input_ids`, `labels`: (tokens,) int32; a label is the token's id, or `IGNORED`.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def labelled_tokens(self) -> int:
        """Labels that a model predicts: all but the ignored ones and the first, which nothing precedes."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


def lengths_of(ends: Sequence[int]) -> NDArray[np.int64]:
    """Return the lengths, (n,), of parts that lie one behind the other and end at `ends`."""
    at = np.asarray(ends, dtype=np.int64)
    lengths: NDArray[np.int64] = at - np.concatenate([np.zeros(1, np.int64), at[:-1]])
    return lengths


class Examples(Sequence[Example]):
    """A sequence of examples in three flat arrays: ids, whether each carries loss, and where each example ends.

    Args:
        examples: to begin with.
        pad_id: the token id that fills up short rows of a batch.
    """

    def __init__(self, examples: Iterable[Example] = (), pad_id: int = 0) -> None:
        self.pad_id = pad_id
        self.labelled_tokens = 0
        self._ids = array("i")
        self._labelled = bytearray()
        self._ends = array("q")
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

    def append(self, example: Example) -> None:
        """Add one example at the end."""
        self._ids.frombytes(np.ascontiguousarray(example.input_ids, dtype=np.int32).tobytes())
        self._labelled += (example.labels != IGNORED).astype(np.uint8).tobytes()
        self._ends.append(len(self._ids))
        self.labelled_tokens += example.labelled_tokens

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples([self[place] for place in range(*index.indices(len(self)))], self.pad_id)
        place = range(len(self))[index]
        start, end = (self._ends[place - 1] if place else 0), self._ends[place]
        input_ids = np.frombuffer(self._ids[start:end], dtype=np.int32)
        labelled = np.frombuffer(self._labelled[start:end], dtype=np.uint8)
        return Example(input_ids, np.where(labelled == 1, input_ids, np.int32(IGNORED)))
