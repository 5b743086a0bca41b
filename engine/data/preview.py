"""A first look at a dataset: how its rows are read, how many there are, and the first conversations. Never torch."""

from dataclasses import dataclass

from engine.data.columns import UnusableRowError
from engine.data.formats import Conversation, Kind
from engine.data.labels import LabelledText, Labels
from engine.data.sources import iterate_rows, load_source, read_source_row, recognise_source, split_rows
from engine.spec import Role, RunSpec

CHECKED_ROWS = 20_000  # about a second


@dataclass(frozen=True)
class Preview:
    """What a dataset looks like before it is tokenised. Counts are rows.

    `dropped` counts rows to train on that cannot be used, by reason, among the first `checked_rows`; what is too long
    shows when it is tokenised.
    """

    name: str
    format: Kind
    columns: dict[Role, str]
    rows: int
    training_rows: int
    evaluation_rows: int
    dropped: dict[str, int]
    checked_rows: int
    conversations: tuple[Conversation | LabelledText, ...]
    labels: Labels | None = None


def preview_dataset(spec: RunSpec, rows: int = 5) -> Preview:
    """Return a first look at the dataset of `spec`.

    Args:
        spec: names the dataset and how it is read.
        rows: conversations to show; rows that cannot be used are passed over.

    Raises:
        DatasetError: the dataset cannot be read, or has no column to train on.
        HubUnreachableError: it is on the Hub, which does not answer.
    """
    source = load_source(spec)
    row_format = recognise_source(source, spec)
    training, held_out = split_rows(source, spec)
    checked = min(len(training), CHECKED_ROWS)
    conversations: list[Conversation | LabelledText] = []
    dropped: dict[str, int] = {}
    for row in iterate_rows(training.take(checked)):
        try:
            conversation = read_source_row(row, source, row_format)
        except UnusableRowError as error:
            dropped[str(error)] = dropped.get(str(error), 0) + 1
            continue
        if len(conversations) < rows:
            conversations.append(conversation)
    return Preview(
        source.name,
        row_format.kind,
        row_format.columns,
        len(training) + len(held_out),
        len(training) - sum(dropped.values()),
        len(held_out),
        dropped,
        checked,
        tuple(conversations),
        row_format.labels,
    )
