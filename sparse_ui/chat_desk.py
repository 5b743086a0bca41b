"""Keeps at most one chat process.

It starts with the first message, and ends on a change of run, when idle, where a GPU is wanted, and with the app.
"""

import threading
import time
from collections.abc import Iterator

from engine.hardware import resolve_device
from engine.runs import Run
from engine.workers import ChatChunk, ChatProcess, Side, start_chat

IDLE_S = 600.0  # a chat holds a model in memory; after ten idle minutes it goes


class ChatDesk:
    """One chat process for the whole app, since one model fills a card."""

    def __init__(self) -> None:
        self._process: ChatProcess | None = None
        self._streams = 0
        self._used_s = 0.0
        self._lock = threading.Lock()  # never held while an answer streams: its pieces come on several threads

    def stream(
        self, run: Run, history: dict[Side, list[dict[str, str]]], max_new_tokens: int, temperature: float
    ) -> Iterator[ChatChunk]:
        """Yield the growing answers of base and tuned model to the last message.

        Raises:
            EngineError: the process cannot start, or ended.
        """
        with self._lock:
            if not self._holds(run):
                self._close()
                self._process = start_chat(run)
            assert self._process is not None
            process = self._process
            self._streams += 1
        try:
            yield from process.stream(history, max_new_tokens=max_new_tokens, temperature=temperature)
        finally:
            with self._lock:
                self._streams -= 1
                self._used_s = time.monotonic()

    def loaded(self, run: Run) -> bool:
        """Return whether the model of `run` is at hand."""
        with self._lock:
            return self._process is not None and self._holds(run) and self._process.loaded

    def close(self) -> None:
        """End the chat process, if there is one."""
        with self._lock:
            self._close()

    def close_unless(self, run_id: str | None) -> None:
        """End the chat process where it belongs to another run."""
        with self._lock:
            if self._process is not None and self._process.run.id != run_id:
                self._close()

    def close_if(self, run: Run) -> None:
        """End the chat process where it belongs to `run`."""
        with self._lock:
            if self._process is not None and self._process.run == run:
                self._close()

    def make_room(self, device: str) -> None:
        """End the chat process where `device` of a spec is a GPU, and a run or a measurement is to begin there."""
        if not resolve_device(device).is_cpu:
            self.close()

    def close_if_idle(self) -> None:
        """End the chat process where nobody has written for `IDLE_S` seconds."""
        with self._lock:
            if self._streams == 0 and time.monotonic() - self._used_s > IDLE_S:
                self._close()

    def _holds(self, run: Run) -> bool:
        return self._process is not None and self._process.run == run and self._process.alive

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None
