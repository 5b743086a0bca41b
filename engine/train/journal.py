"""Where a worker says what happens: the run folder, of which one process is the owner."""

import time
from dataclasses import replace
from types import FrameType

import psutil

from engine.events import Event, EventWriter, RunState, StateChanged, Stepped
from engine.runs import Run, RunStatus, read_status, take_request, write_status
from engine.train.control import NeverAsked

STATUS_INTERVAL_S = 0.3


class Journal:
    """Writes what happens into the run folder, and takes requests from it."""

    def __init__(self, run: Run) -> None:
        """Open the event file of `run` and claim its status."""
        process = psutil.Process()
        self.run = run
        self._events = EventWriter(run.events_path)
        before = read_status(run)  # a run that goes on is where it was until its first step
        self._status = RunStatus(
            "queued",
            pid=process.pid,
            create_time=process.create_time(),
            step=before.step,
            total_steps=before.total_steps,
        )
        self._stop = False
        self._written_s = 0.0

    def emit(self, event: Event) -> None:
        """Append an event; the status follows it."""
        self._events.write(event)
        status = replace(self._status, seq=self._events.seq)
        if isinstance(event, StateChanged):
            status = replace(status, state=event.state, detail=event.detail)
        if isinstance(event, Stepped):
            status = replace(status, step=event.step, total_steps=event.total_steps, remaining_s=event.remaining_s)
        self._status = status
        if not isinstance(event, Stepped) or time.monotonic() - self._written_s > STATUS_INTERVAL_S:
            write_status(self.run, status)
            self._written_s = time.monotonic()

    def state(self, state: RunState, detail: str = "") -> None:
        """Enter a state."""
        self.emit(StateChanged(state, detail))

    def request_stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Stop after the step in progress; a signal handler."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the run is to end; once true it stays so."""
        self._stop = self._stop or take_request(self.run, "stop")
        return self._stop

    def checkpoint_requested(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        return take_request(self.run, "checkpoint")


class Listener(NeverAsked):
    """Stands for the journal in a process that only follows the first one of its run: nothing is written."""

    def emit(self, event: Event) -> None:
        """Leave it to the first process."""

    def state(self, state: RunState, detail: str = "") -> None:
        """Leave it to the first process."""
