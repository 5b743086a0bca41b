"""How long the rows of a dataset are in tokens, kept on disk by all that decides it. Torch-free: others count.

A worker counts the rows that it trains on; for Setup the process that traces does it beforehand.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from engine.planner.kept import keep, kept_path
from engine.planner.shape import resolve_model
from engine.presets import find_dataset
from engine.runs import read_json
from engine.spec import RunSpec, about

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIELDS = ("task", "model", "model_revision", "sequence_length", "seed")  # that decide, beside those of the data
PASSING_S = 600.0  # until what passes by itself is tried again


@dataclass(frozen=True)
class RowLengths:
    """Of the rows to train on: how many there are, the tokens of the longest and of one on average.

    `estimated`: there are so many that a part was tokenised.
    """

    rows: int
    longest: int
    mean: float
    estimated: bool = False

    @classmethod
    def of(cls, lengths: "NDArray[np.int64]") -> Self:
        """Return those of rows that all were tokenised, (rows,) tokens of each, at least one."""
        return cls(len(lengths), int(lengths.max()), float(lengths.mean()))


def known_lengths(spec: RunSpec) -> RowLengths | None:
    """Return how long the rows of a run of `spec` are, where they were counted; its files may not have changed since.

    Raises:
        ModelError: the model cannot be found.
    """
    try:
        return RowLengths(**read_json(_path(spec)))
    except TypeError:
        return None


def why_uncounted(spec: RunSpec) -> str:
    """Return why the rows of a run of `spec` are not counted, where that was tried; else nothing.

    Raises:
        ModelError: the model cannot be found.
    """
    found = read_json(_path(spec))
    passed = found.get("until", math.inf) < time.time()
    return str(found.get("refused", "")) or ("" if passed else str(found.get("uncounted", "")))


def why_refused(spec: RunSpec) -> str:
    """Return why no run of `spec` has rows to train on, where counting them found that; else nothing.

    Raises:
        ModelError: the model cannot be found.
    """
    return str(read_json(_path(spec)).get("refused", ""))


def keep_lengths(spec: RunSpec, lengths: RowLengths) -> None:
    """Write what `known_lengths` reads."""
    keep(_path(spec), asdict(lengths))


def keep_uncounted(spec: RunSpec, why: str, *, refused: bool = False, passes: bool = False) -> None:
    """Write what `why_uncounted` or `why_refused` reads, so that nobody tries again before the files change.

    What `passes` by itself, as a Hub that does not answer, holds for some minutes.
    """
    until = {"until": time.time() + PASSING_S} if passes else {}
    keep(_path(spec), {"refused" if refused else "uncounted": why, **until})


def _path(spec: RunSpec) -> Path:
    values = spec.model_dump(mode="json")
    decides = {name: value for name, value in values.items() if name in _FIELDS or about(name).group == "data"}
    model, dataset = resolve_model(spec.model, spec.model_revision), find_dataset(spec.dataset or "")
    found = {name: path.absolute() for name, path in (("model", model), ("dataset", dataset)) if isinstance(path, Path)}
    decides |= {name: str(path) for name, path in found.items()}  # a worker is given them absolute
    patterns = ("token*", "chat_template*", "config.json")  # which says how many tokens the model knows
    tokenizer = [file for pattern in patterns for file in model.glob(pattern)] if isinstance(model, Path) else []
    files = [sorted(tokenizer), _files(dataset)]
    return kept_path("rows", decides | {"files": [[_stamp(file) for file in group] for group in files]})


def _files(dataset: Path | None) -> list[Path]:
    if dataset is None or dataset.is_file():
        return [] if dataset is None else [dataset]
    return sorted(file for pattern in ("*", "*/*") for file in dataset.glob(pattern) if file.is_file())


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # the last one: who may read it
