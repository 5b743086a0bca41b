"""Keeps the commands that a person started from a tab, one at a time for each kind, and what they answered.

Here and not in the page, so that a page that is loaded again finds them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from engine.errands import Errand
from engine.errors import EngineError
from engine.units import format_bytes, format_duration
from sparse_ui import cards
from sparse_ui.messages import explain


@dataclass(frozen=True)
class _AtWork:
    """An errand with the words for it: what it does, and how its lines are told."""

    errand: Errand
    doing: str
    tell: Callable[[Sequence[str]], Sequence[str]]


class ErrandDesk:
    """At most one errand at a time: each holds a model in memory."""

    def __init__(self) -> None:
        self._at_work: dict[str, _AtWork] = {}
        self._answers: dict[str, str] = {}
        self._lock = threading.Lock()

    def start(
        self,
        place: str,
        doing: str,
        *arguments: str,
        growing: Path | None = None,
        tell: Callable[[Sequence[str]], Sequence[str]] = tuple,
    ) -> None:
        """Start `python -m engine ARGUMENTS`.

        Args:
            place: where on the page it answers.
            doing: what it does, such as `Exporting run X`.
            arguments: the command and its arguments.
            growing: folder that it fills.
            tell: from the lines of its answer to the sentences that are shown.

        Raises:
            EngineError: another one is at work.
        """
        with self._lock:
            self._collect()
            busy = next(iter(self._at_work.values()), None)
            if busy is not None:
                raise EngineError(f"One thing at a time: {busy.doing} is not done yet. Try again when it is.")
            self._answers.pop(place, None)
            self._at_work[place] = _AtWork(Errand(*arguments, growing=growing), doing, tell)

    def busy(self) -> bool:
        """Return whether an errand is at work."""
        with self._lock:
            self._collect()
            return bool(self._at_work)

    def show(self, place: str) -> str:
        """Return, as HTML, how far the errand of a place is, or what it answered; empty where there was none."""
        with self._lock:
            self._collect()
            return _progress(self._at_work[place]) if place in self._at_work else self._answers.get(place, "")

    def clear(self, place: str) -> None:
        """Forget what the errand of a place answered."""
        with self._lock:
            self._answers.pop(place, None)

    def _collect(self) -> None:
        for place, item in list(self._at_work.items()):
            if not item.errand.alive:
                del self._at_work[place]
                self._answers[place] = _answer(item)


def _progress(item: _AtWork) -> str:
    words = f"{item.doing}, {format_duration(time.monotonic() - item.errand.started_s)}"
    written = item.errand.written_bytes
    return f'<span class="soft">{escape(words)}{f", {format_bytes(written)} written" if written else ""} …</span>'


def _answer(item: _AtWork) -> str:
    try:
        return cards.callout(item.tell(item.errand.wait()), "good")
    except Exception as error:
        return cards.callout(explain(error, item.doing).sentences)
