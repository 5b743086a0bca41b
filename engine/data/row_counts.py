"""How long the rows of a dataset are, for the plan of a run over it; of very many rows a part is tokenised."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.batches import explain_no_rows, tokenise_rows
from engine.data.columns import UnusableRowError
from engine.data.formats import Conversation, RowFormat
from engine.data.sources import Source, iterate_rows, load_source, read_source_row, recognise_source, split_rows
from engine.data.templates import TOO_LONG
from engine.errors import DatasetError, EngineError
from engine.planner.row_lengths import RowLengths
from engine.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def count_rows(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", at_most: int) -> RowLengths:
    """Return how long the rows to train on are.

    Of more than `at_most` rows that many are tokenised: those with the most text, for the longest, and as many drawn
    from the others, to stand for them all.

    Raises:
        DatasetError: the dataset cannot be read, or has no row to train on.
        EngineError: it has none among those that were tokenised.
    """
    source = load_source(spec)
    row_format = recognise_source(source, spec)
    rows, _ = split_rows(source, spec)
    tokenise = functools.partial(tokenise_rows, spec, tokenizer, row_format, source)
    if len(rows) <= at_most:
        found = tokenise(rows)
        if not len(found.examples):
            raise DatasetError(explain_no_rows(source, found.counts))
        return RowLengths.of(found.examples.lengths)
    sizes = np.array([_text_bytes(row, source, row_format) for row in iterate_rows(rows)])
    order = sizes.argsort(kind="stable")[::-1]
    half = at_most // 2
    drawn = np.random.default_rng(spec.seed).choice(order[half:], at_most - half, replace=False)
    largest, sample = (tokenise(rows.select(np.sort(part))) for part in (order[:half], drawn))
    if not len(largest.examples) + len(sample.examples):
        raise EngineError(f"Of {at_most:,} rows that were looked at none can be trained on.")
    each = (len(rows) - half) / len(drawn)  # rows that a drawn one stands for
    count = len(largest.examples) + each * len(sample.examples)
    tokens = largest.examples.tokens + each * sample.examples.tokens
    # Where rows are too long to be trained on, there may be some that just are not.
    longest = spec.sequence_length if TOO_LONG in largest.counts else 0
    longest = max(longest, *(int(part.examples.lengths.max(initial=0)) for part in (largest, sample)))
    return RowLengths(round(count), longest, tokens / count, estimated=True)


def _text_bytes(row: Mapping[str, Any], source: Source, row_format: RowFormat) -> int:
    """Return the size of what a row says, in UTF-8: of all that is quick to know the nearest to its tokens."""
    try:
        item = read_source_row(row, source, row_format)
    except UnusableRowError:
        return 0
    if isinstance(item, Conversation):
        return len(item.text.encode()) + sum(len(message.content.encode()) for message in item.messages)
    return len(item.line.encode())
