"""What a run has said so far, parsed once: a reader that goes on from the byte where it left off.

Only a cache: the run folder is the truth, and a fresh reader of the same folder yields the same history.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from engine.events import (
    Checkpointed,
    DataPrepared,
    Evaluated,
    Event,
    ModelLoaded,
    Probed,
    Selected,
    Stepped,
    Warned,
)
from engine.runs import Run, read_events


@dataclass
class History:
    """The events of one run by kind, ordered by step.

    `steps` holds every optimizer step once: a resumed run goes on from its checkpoint, and the steps after it are
    replaced by those of the resumed run. `version` counts the events taken in.
    """

    steps: list[Stepped] = field(default_factory=list)
    evaluations: dict[int, Evaluated] = field(default_factory=dict)
    probes: dict[int, Probed] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: DataPrepared | None = None
    model: ModelLoaded | None = None
    selection: Selected | None = None
    checkpoint_step: int | None = None
    version: int = 0

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.version += 1
        match event:
            case Stepped():
                self._rewind(event.step)
                self.steps.append(event)
            case Evaluated():
                self.evaluations[event.step] = event
            case Probed():
                self.probes[event.step] = event
            case Warned():
                self.warnings.append(event.message)
            case DataPrepared():
                self.data = event
            case ModelLoaded():
                self.model = event
            case Selected():
                self.selection = event
            case Checkpointed():
                self.checkpoint_step = event.step

    def _rewind(self, step: int) -> None:
        if not self.steps or self.steps[-1].step < step:
            return
        self.steps = [item for item in self.steps if item.step < step]
        self.evaluations = {at: item for at, item in self.evaluations.items() if at <= step}
        self.probes = {at: item for at, item in self.probes.items() if at <= step}

    @property
    def last(self) -> Stepped | None:
        """The newest optimizer step."""
        return self.steps[-1] if self.steps else None

    @property
    def first_evaluation(self) -> Evaluated | None:
        """The evaluation before training: the untuned base."""
        return self.evaluations.get(0)

    @property
    def last_evaluation(self) -> Evaluated | None:
        """The newest evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def last_samples(self) -> Evaluated | None:
        """The newest evaluation that answered questions."""
        answered = [step for step, item in self.evaluations.items() if item.samples]
        return self.evaluations[max(answered)] if answered else None

    @property
    def last_probe(self) -> Probed | None:
        """The newest probe of the gradient."""
        return self.probes[max(self.probes)] if self.probes else None


class HistoryReader:
    """Keeps the history of each run that was looked at, and reads only what is new."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[History, int]] = {}
        self._lock = threading.Lock()

    def read(self, run: Run) -> History:
        """Return the history of `run` up to now."""
        with self._lock:
            history, position = self._kept.get(run.path, (History(), 0))
            records, position = read_events(run, position)
            for record in records:
                history.add(record.event)
            self._kept[run.path] = (history, position)
            return history

    def forget(self, run: Run) -> None:
        """Drop what is kept of a run that was deleted."""
        with self._lock:
            self._kept.pop(run.path, None)
