"""What a run says while it runs: one JSON object a line, in the order it happened.

The worker appends through `EventWriter`; everyone else reads through `runs.read_events`.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

RunState = Literal["queued", "preparing", "running", "stopping", "finished", "stopped", "failed"]
LIVE_STATES: tuple[RunState, ...] = ("queued", "preparing", "running", "stopping")


@dataclass(frozen=True)
class Event:
    """Base of all events; `kind` names the class in the file."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class StateChanged(Event):
    """The run entered a state; `detail` says why where that helps (a failure's sentence)."""

    kind: ClassVar[str] = "state"
    state: RunState
    detail: str = ""


@dataclass(frozen=True)
class Warned(Event):
    """Something the person should know that does not end the run."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True)
class DataPrepared(Event):
    """The dataset as it will be trained on. Counts are rows, except the two token counts.

    `dropped` counts the training rows left out, by reason. Of a classification, `labels` are the names of the labels,
    empty where they are numbers, and `labelled_tokens` counts rows.
    """

    kind: ClassVar[str] = "data"
    format: str
    columns: dict[str, str]
    template: str
    rows: int
    training_rows: int
    evaluation_rows: int
    dropped: dict[str, int]
    tokens: int
    labelled_tokens: int
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelLoaded(Event):
    """The base model is in memory. `tensors` weights are trained, of `target_numel` entries together.

    `head_numel`: entries of a classifier's head, all trained beside them.
    """

    kind: ClassVar[str] = "model"
    num_parameters: int
    tensors: int
    target_numel: int
    num_active: int
    device: str
    dtype: str
    seconds: float
    head_numel: int = 0


@dataclass(frozen=True)
class Preflighted(Event):
    """A step at the longest batch, `rows` x `length` tokens, went well before the run; `peak_bytes` is what it took."""

    kind: ClassVar[str] = "preflight"
    rows: int
    length: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Selected(Event):
    """Trained entries were chosen in `step`, all of them or, where SpIEL drops and grows, `replaced` of them.

    `gradient_share`: the multiplications that their gradient takes, of those for the dense gradients of the targets.
    """

    kind: ClassVar[str] = "selection"
    step: int
    method: str
    num_active: int
    density: float
    replaced: int = 0
    gradient_share: float | None = None


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step. `loss` is the mean over the step's labelled tokens; memory is of the run's device.

    Steps that were read together (`logging_interval`) share their time equally. Of several processes loss and tokens
    are those of all, memory is the first one's.
    """

    kind: ClassVar[str] = "step"
    step: int
    total_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    memory_bytes: int
    peak_bytes: int
    elapsed_s: float
    remaining_s: float


@dataclass(frozen=True)
class Probed(Event):
    """Shares of the squared gradient norm in one step's gradient (SIFT, Figures 3d and 4), each in [0, 1].

    `top_share`: held by the top 1 percent of entries; `selected_share`: by the trained entries; `best_share`: by the
    best choice of as many entries in this batch. `tensors` has the same three by parameter name.
    """

    kind: ClassVar[str] = "probe"
    step: int
    top_share: float
    selected_share: float
    best_share: float
    tensors: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Sample:
    """A held-out question with the expected and the given answer."""

    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out figures at `step` (0: the untuned base). `exact_match` is None where answers were not generated.

    `metrics`: of a classification, by name, see `engine.metrics`; its base has a head that is not trained yet.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    loss: float
    exact_match: float | None = None
    samples: tuple[Sample, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpointed(Event):
    """A checkpoint from which the run can go on was written."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str


EVENT_TYPES: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        StateChanged,
        Warned,
        DataPrepared,
        ModelLoaded,
        Preflighted,
        Selected,
        Stepped,
        Probed,
        Evaluated,
        Checkpointed,
    )
}


@dataclass(frozen=True)
class Record:
    """One line of the file: sequence number from 1, wall-clock time in seconds since the epoch, the event."""

    seq: int
    time_s: float
    event: Event


def to_line(record: Record) -> str:
    """Return the JSON line of a record, without the newline. NaN and infinities become null."""
    body = _finite({"seq": record.seq, "time_s": record.time_s, "kind": record.event.kind, **asdict(record.event)})
    return json.dumps(body, ensure_ascii=False, allow_nan=False)


def from_line(line: str) -> Record:
    """Return the record of one JSON line.

    Raises:
        ValueError: the line is not JSON, or no event of this version.
    """
    body: dict[str, Any] = json.loads(line)
    seq, time_s, kind = body.pop("seq"), body.pop("time_s"), body.pop("kind")
    cls = EVENT_TYPES.get(kind)
    if cls is None:
        raise ValueError(f"unknown event kind {kind!r}")
    if cls is Evaluated:
        body["samples"] = tuple(Sample(**sample) for sample in body["samples"])
    if cls is Probed:
        body["tensors"] = {name: tuple(shares) for name, shares in body["tensors"].items()}
    if cls is DataPrepared:
        body["labels"] = tuple(body.get("labels", ()))
    for name in ("loss", "gradient_norm"):
        if name in body and body[name] is None:
            body[name] = math.nan
    try:
        return Record(seq, time_s, cls(**body))
    except TypeError as error:
        raise ValueError(f"another version wrote this {kind} event: {error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class EventWriter:
    """Appends events to a file, each line whole and flushed to the operating system.

    A line that a killed process left torn is cut off; sequence numbers go on from the last whole line.
    """

    def __init__(self, path: Path) -> None:
        self.seq = self._mend(path)
        self._file = path.open("a", encoding="utf-8")

    @staticmethod
    def _mend(path: Path) -> int:
        if not path.exists():
            return 0
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        lines = whole.splitlines()
        return int(json.loads(lines[-1])["seq"]) if lines else 0

    def write(self, event: Event) -> None:
        """Append one event."""
        self.seq += 1
        self._file.write(to_line(Record(self.seq, time.time(), event)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
