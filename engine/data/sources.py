"""Where rows come from: local files and folders, bundled datasets and the Hugging Face Hub. Never torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.files import SUFFIXES, find_parts, is_data_file, load_files, suffix_of
from engine.data.formats import Conversation, RowFormat, read_row, recognise
from engine.data.labels import LabelledText, read_labelled, read_labels
from engine.errors import DatasetError
from engine.hub import hub_online, require_hub
from engine.presets import bundled_datasets, find_dataset
from engine.spec import RunSpec

if TYPE_CHECKING:
    import datasets

# The first that is there is held out; validation_matched is that of MNLI.
HELD_OUT = ("validation", "validation_matched", "valid", "val", "dev", "test", "eval")
HEAD_ROWS = 20
READ_ROWS = 1000
# A passage of a text file: about one sequence, at the three characters or more that a token of prose takes.
CHARACTERS_PER_TOKEN = 3
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """The rows of a dataset.

    `evaluation` is None where the dataset has no held-out part; `split_rows` then holds rows out. `passages` tells
    that the rows are stretches of a longer text.
    """

    name: str
    training: "datasets.Dataset"
    evaluation: "datasets.Dataset | None"
    passages: bool = False


def load_source(spec: RunSpec) -> Source:
    """Return the rows that `spec.dataset` and `spec.dataset_split` name.

    Raises:
        DatasetError: it is not there, cannot be read, has no such part or no rows.
        HubUnreachableError: it is on the Hub, which does not answer, and not in the cache.
    """
    name = spec.dataset
    if not name:
        raise DatasetError("dataset is missing: name a file, a folder, a bundled dataset or a Hub id.")
    path = _local_path(name)
    if path is not None and spec.dataset_config is not None:
        raise DatasetError(
            f"dataset_config {spec.dataset_config!r} is for datasets on the Hub, and {name!r} is on this computer. "
            "Clear it."
        )
    if path is None:
        source = _load_hub(name, spec)
    elif path.is_dir():
        source = _load_local(name, find_parts(path), spec)
    elif is_data_file(path):
        source = _load_local(name, {"train": [path]}, spec)
    else:
        raise DatasetError(
            f"dataset must be a file with one of the suffixes {', '.join(SUFFIXES)}, got {path.name!r}. "
            "Convert it, or rename it if it is one of these."
        )
    if not len(source.training):
        raise DatasetError(f"Dataset {name!r} has no rows in {spec.dataset_split!r}. Give one with at least one row.")
    return source


def _local_path(name: str) -> Path | None:
    """The file or folder that `name` means; None for a Hub id."""
    found = find_dataset(name)
    if found is not None:
        return found
    is_path = name.startswith((".", "/", "~")) or suffix_of(Path(name)) in SUFFIXES
    if is_path or not _HUB_ID.fullmatch(name):
        bundled = ", ".join(bundled_datasets()) or "none"
        raise DatasetError(
            f"There is no file, folder or bundled dataset {name!r}. Bundled: {bundled}; "
            "a dataset on the Hub is named owner/name."
        )
    return None


def _quiet() -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised, and said in our words


def _chosen(parts: list[str], spec: RunSpec, name: str) -> tuple[str, str | None]:
    """The part to train on, and the part that is held out, if there is one."""
    wanted = spec.dataset_split.partition("[")[0]
    if wanted not in parts:
        offered = "train" if "train" in parts else next((part for part in parts if part not in HELD_OUT), parts[0])
        raise DatasetError(
            f"Dataset {name!r} has no part {wanted!r}: it has {', '.join(parts)}. Set dataset_split={offered}."
        )
    return spec.dataset_split, next((part for part in HELD_OUT if part in parts and part != wanted), None)


def _load_local(name: str, parts: dict[str, list[Path]], spec: RunSpec) -> Source:
    training, held_out = _chosen([*parts], spec, name)
    _quiet()
    rows = load_files(parts, training, name)
    evaluation = load_files(parts, held_out, name) if held_out else None
    if SUFFIXES[suffix_of(parts[training.partition("[")[0]][0])] != "text":
        return Source(name, rows, evaluation)
    size = spec.sequence_length * CHARACTERS_PER_TOKEN
    return Source(name, _join_lines(rows, size), evaluation and _join_lines(evaluation, size), passages=True)


def _join_lines(lines: "datasets.Dataset", size: int) -> "datasets.Dataset":
    joined: datasets.Dataset = lines.map(
        join_lines, batched=True, batch_size=10 * READ_ROWS, remove_columns=["text"], fn_kwargs={"size": size}
    )
    return joined


def join_lines(batch: dict[str, list[str]], size: int) -> dict[str, list[str]]:
    """Join lines to passages of up to `size` characters. A longer line is a passage; passages of blank lines go."""
    passages, lines, length = list[str](), list[str](), 0
    for line in batch["text"]:
        if lines and length + len(line) > size:
            passages.append("\n".join(lines).strip("\n"))
            lines, length = [], 0
        lines.append(line)
        length += len(line) + 1
    passages.append("\n".join(lines).strip("\n"))
    return {"text": [passage for passage in passages if passage.strip()]}


def _load_hub(name: str, spec: RunSpec) -> Source:
    online = hub_online()
    import datasets
    import huggingface_hub.constants

    if not online:  # the libraries read the environment when they are imported, which may be long ago
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    _quiet()
    path, _, config = name.partition(":")
    config = spec.dataset_config or config
    try:
        builder = datasets.load_dataset_builder(path, config or None)
        builder.download_and_prepare()
    except (ConnectionError, FileNotFoundError) as error:
        require_hub(f"dataset {name!r}")
        raise DatasetError(f"Dataset {name!r} cannot be read from the Hub: {_first_line(error)}") from None
    except Exception as error:
        raise DatasetError(_hub_sentence(name, path, error)) from None
    training, held_out = _chosen([str(part) for part in builder.info.splits], spec, name)
    rows = builder.as_dataset(split=training)
    return Source(name, rows, builder.as_dataset(split=held_out) if held_out else None)


def _hub_sentence(name: str, path: str, error: Exception) -> str:
    configs = re.findall(r"'([\w.-]+)'", str(error).partition("available configs")[2])
    if configs:
        return f"Dataset {path!r} has several configurations: {', '.join(configs)}. Name one: {path}:{configs[0]}."
    return f"Dataset {name!r} cannot be read from the Hub: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return f"{str(error).strip().partition(chr(10))[0].rstrip('.')[:200] or type(error).__name__}."


def recognise_source(source: Source, spec: RunSpec) -> RowFormat:
    """Return how the rows of `source` are read.

    Raises:
        DatasetError: a named column is not there, none can be trained on, or there are no labels to tell apart.
    """
    head = [source.training[place] for place in range(min(HEAD_ROWS, len(source.training)))]
    found = recognise(source.name, source.training.column_names, head, spec)
    if found.kind != "classification":
        return found
    return replace(found, labels=read_labels(source.name, source.training, found.columns["label"]))


def read_source_row(row: Mapping[str, Any], source: Source, row_format: RowFormat) -> Conversation | LabelledText:
    """Return what a row of `source` says.

    Raises:
        UnusableRowError: nothing that can be trained on.
    """
    if row_format.labels is not None:
        return read_labelled(row, row_format.columns, row_format.labels)
    return read_row(row, row_format, ends=not source.passages)


def split_rows(source: Source, spec: RunSpec) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """Return the rows to train on, in their order, and the held-out rows, in the order that the seed gives.

    Without a held-out part, `evaluation_fraction` of the rows is held out: at least one, where that is above 0 and
    there are two rows.
    """
    random = np.random.default_rng(spec.seed)
    if source.evaluation is not None:
        return source.training, source.evaluation.select(random.permutation(len(source.evaluation)))
    count = len(source.training)
    held = min(count - 1, max(1, round(spec.evaluation_fraction * count))) if spec.evaluation_fraction else 0
    order = random.permutation(count)
    return source.training.select(np.sort(order[held:])), source.training.select(order[:held])


def iterate_rows(rows: "datasets.Dataset") -> Iterator[dict[str, Any]]:
    """Return the rows of a dataset one by one, read in batches."""
    for batch in rows.iter(READ_ROWS):
        columns = [*batch]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
