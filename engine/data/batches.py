"""From a dataset to rows of tokens, and from rows to micro-batches; `steps.py` says which rows make which step."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.classification import LabelledExample, LabelledExamples, encode_labelled
from engine.data.columns import UnusableRowError
from engine.data.examples import IGNORED, Example, Examples
from engine.data.formats import Conversation, RowFormat
from engine.data.labels import LabelledText, Labels
from engine.data.sources import Source, iterate_rows, load_source, read_source_row, recognise_source, split_rows
from engine.data.templates import CUT, encode_prompt, encode_rows, resolve_template
from engine.data.token_ids import padding_id, require_rows
from engine.errors import DatasetError
from engine.events import DataPrepared
from engine.planner.row_lengths import RowLengths
from engine.planner.shape import read_shape
from engine.spec import RunSpec

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

ENCODE_ROWS = 256  # tokenised together; more is no faster
_TEMPLATES = {"text": "none (plain text)", "classification": "none (labelled texts)"}
Progress = Callable[[int, int], None]  # rows done, rows in all
AnyExample = Example | LabelledExample


@dataclass(frozen=True)
class Question:
    """A held-out row to be answered: the prompt's ids, the question as a person reads it, the answer given there."""

    prompt_ids: list[int]
    question: str
    expected: str


@dataclass(frozen=True)
class PreparedData:
    """A dataset ready for training. `evaluation` and `questions` are held out; `questions` is empty for texts.

    Of a classification, `labels` are those of the dataset, and `texts` the rows of `evaluation`.
    """

    training: Examples | LabelledExamples
    evaluation: Examples | LabelledExamples
    questions: list[Question]
    summary: DataPrepared
    labels: Labels | None = None
    texts: tuple[LabelledText, ...] = ()

    @property
    def row_lengths(self) -> RowLengths:
        """How long the rows to train on are."""
        return RowLengths.of(self.training.lengths)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, filled up at the right to its longest row.

    `input_ids`, `labels`, `attention_mask`: (rows, longest) int64; labels are not shifted and -100 where no loss is.
    `labelled_tokens`: labels that the model predicts. Of a classification, `labels` are (rows,) float64, a class number
    or the number of a regression each, and `segments`, (rows, longest) int64, tell the texts of a pair apart.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    labelled_tokens: int
    segments: Tensor | None = None

    def pinned(self) -> "Batch":
        """Return the batch in memory from which a GPU copies by itself; where there is no GPU, as it is."""
        if not torch.cuda.is_available():
            return self
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            segments=None if self.segments is None else self.segments.pin_memory(),
        )


@dataclass
class TokenisedRows:
    """The examples of some rows, the chats or labelled texts they came from and the counts by reason."""

    examples: Examples | LabelledExamples
    chats: list[Conversation] = field(default_factory=list)
    texts: list[LabelledText] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        """Count a row that is not used as it is."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


def prepare_data(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", progress: Progress | None = None) -> PreparedData:
    """Return the dataset of `spec` tokenised, with the rows held out for evaluation.

    At most `evaluation_rows` examples are evaluated and `exact_match_rows` questions asked; the other held-out rows
    are neither tokenised nor trained on.

    Args:
        spec: names the dataset and how it is read.
        tokenizer: of the base model.
        progress: told the rows done and the rows in all, every `ENCODE_ROWS` rows.

    Raises:
        DatasetError: the dataset cannot be read, or yields no row to train on, or its rows hold token ids that the
            model's table of embeddings lacks.
        ModelError: the model of `spec` cannot be read.
        HubUnreachableError: it is on the Hub, which does not answer.
    """
    source = load_source(spec)
    row_format = recognise_source(source, spec)
    template = _TEMPLATES.get(row_format.kind) or resolve_template(tokenizer, spec.template)
    training_rows, held_out = split_rows(source, spec)
    encode = functools.partial(tokenise_rows, spec, tokenizer, row_format, source)
    training = encode(training_rows, None, progress)
    if not len(training.examples):
        raise DatasetError(explain_no_rows(source, training.counts))
    evaluation = encode(held_out, max(spec.evaluation_rows, spec.exact_match_rows), None)
    if row_format.labels is not None and len(held_out) and not len(evaluation.examples):
        reasons = ", ".join(f"{reason} {count}" for reason, count in evaluation.counts.items())
        raise DatasetError(
            f"The held-out part of dataset {source.name!r} has no labelled row: of {len(held_out)} rows, {reasons}. "
            "Take that part away, so that rows to train on are held out."
        )
    return PreparedData(
        training.examples,
        evaluation.examples[: spec.evaluation_rows],
        [_question(chat, tokenizer, spec) for chat in evaluation.chats[: spec.exact_match_rows]],
        DataPrepared(
            format=row_format.kind,
            columns={str(role): column for role, column in row_format.columns.items()},
            template=template,
            rows=len(training_rows) + len(held_out),
            training_rows=len(training.examples),
            evaluation_rows=min(len(evaluation.examples), spec.evaluation_rows),
            dropped=training.counts,
            tokens=training.examples.tokens,
            labelled_tokens=training.examples.labelled_tokens,
            labels=row_format.labels.names if row_format.labels else (),
        ),
        row_format.labels,
        tuple(evaluation.texts[: spec.evaluation_rows]),
    )


def explain_no_rows(source: Source, counts: dict[str, int]) -> str:
    """Return why no row can be trained on, by how many rows were dropped for each reason, and what to do."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    remedy = (
        "Raise sequence_length."
        if max(counts, key=lambda reason: counts[reason]) == "too long"
        else "Name its columns."
    )
    return f"Dataset {source.name!r} has no row to train on: of {len(source.training)} rows, {reasons}. {remedy}"


def tokenise_rows(
    spec: RunSpec,
    tokenizer: "PreTrainedTokenizerBase",
    row_format: RowFormat,
    source: Source,
    rows: "datasets.Dataset",
    limit: int | None = None,
    progress: Progress | None = None,
) -> TokenisedRows:
    """Tokenise rows, up to `limit` examples.

    Raises:
        DatasetError: they hold token ids that the model's table of embeddings lacks.
        ModelError: the model of `spec` cannot be read.
    """
    known = read_shape(spec.model, spec.model_revision, spec.task).embedding_rows
    pad_id = padding_id(tokenizer, known)
    result = TokenisedRows(Examples(pad_id=pad_id) if row_format.labels is None else LabelledExamples(pad_id=pad_id))
    items = _read_rows(rows, row_format, source, result)
    done = 0
    while block := list(islice(items, ENCODE_ROWS if limit is None else min(limit, ENCODE_ROWS))):
        _add_texts(result, [item for item in block if isinstance(item, LabelledText)], tokenizer, spec, limit)
        _add_chats(result, [item for item in block if isinstance(item, Conversation)], tokenizer, spec, limit)
        done += len(block)
        if progress:
            progress(done, len(rows))
        if limit is not None and len(result.examples) >= limit:
            break
    require_rows(result.examples.largest_id, known, spec.model)
    return result


def _add_chats(
    result: TokenisedRows,
    chats: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    spec: RunSpec,
    limit: int | None,
) -> None:
    for chat, encoded in zip(chats, encode_rows(chats, tokenizer, spec.template, spec.sequence_length), strict=True):
        if encoded.reason:
            result.count(encoded.reason)
        for example in encoded.examples:
            result.examples.append(example)  # type: ignore[arg-type]
        if encoded.examples and chat.messages and limit is not None:
            result.chats.append(chat)


def _add_texts(
    result: TokenisedRows,
    texts: Sequence[LabelledText],
    tokenizer: "PreTrainedTokenizerBase",
    spec: RunSpec,
    limit: int | None,
) -> None:
    assert not texts or isinstance(result.examples, LabelledExamples)
    for example, cut in encode_labelled(texts, tokenizer, spec.sequence_length):
        result.examples.append(example)  # type: ignore[arg-type]
        if cut:
            result.count(CUT)
    if limit is not None:
        result.texts += texts


def _read_rows(
    rows: "datasets.Dataset", row_format: RowFormat, source: Source, result: TokenisedRows
) -> Iterator[Conversation | LabelledText | None]:
    """Read rows; one that cannot be used is counted, and None."""
    for row in iterate_rows(rows):
        try:
            yield read_source_row(row, source, row_format)
        except UnusableRowError as error:
            result.count(str(error))
            yield None


def _question(chat: Conversation, tokenizer: "PreTrainedTokenizerBase", spec: RunSpec) -> Question:
    prompt_ids = encode_prompt(chat.messages[:-1], tokenizer, spec.template)
    known = read_shape(spec.model, spec.model_revision, spec.task).embedding_rows
    require_rows(max(prompt_ids, default=-1), known, spec.model)
    return Question(prompt_ids, chat.question, chat.answer.strip())


def evaluation_batches(examples: Sequence[AnyExample], spec: RunSpec) -> Iterator[Batch]:
    """Return the examples in their order, `micro_batch_size` rows to a batch; the last may have fewer."""
    return _batches(examples, spec.micro_batch_size, pad_of(examples))


def _batches(rows: Sequence[AnyExample], size: int, pad_id: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield stack(rows[start : start + size], pad_id)


def pad_of(examples: Sequence[AnyExample]) -> int:
    """Return the token to fill up rows of `examples` with."""
    return examples.pad_id if isinstance(examples, Examples | LabelledExamples) else 0


def stack(rows: Sequence[AnyExample], pad_id: int) -> Batch:
    """Return `rows` as one micro-batch, filled up with `pad_id`."""
    input_ids = _fill([row.input_ids for row in rows], pad_id)
    mask = _fill([np.ones(len(row.input_ids)) for row in rows], 0)
    if labelled := [row for row in rows if isinstance(row, LabelledExample)]:
        labels = torch.tensor([row.label for row in labelled], dtype=torch.float64)
        known = len(labelled[0].segments) > 0
        segments = _fill([row.segments for row in labelled], 0) if known else None
        return Batch(input_ids, labels, mask, len(rows), segments)
    chats = [row for row in rows if isinstance(row, Example)]
    labels = _fill([row.labels for row in chats], IGNORED)
    return Batch(input_ids, labels, mask, sum(row.labelled_tokens for row in chats))


def _fill(rows: Sequence[NDArray[Any]], filler: int) -> Tensor:
    """Return (rows, longest) int64, short rows filled up at the right."""
    filled = np.full((len(rows), max(len(row) for row in rows)), filler, np.int64)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return torch.from_numpy(filled)
