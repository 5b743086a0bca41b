"""Commands of this program at work in a process of their own, for an interface that has no torch: export, compose.

The process is the command itself, so that both say the same. It goes on where the page is closed.
"""

import subprocess
import tempfile
import threading
import time
from pathlib import Path

from engine.errors import EngineError, WorkerError
from engine.processes import command_of, worker_environment

_ERROR = "Error: "  # how the command line begins a sentence that is meant for people


class Errand:
    """`python -m engine ARGUMENTS` at work; its lines are the answer. Made by asking for it."""

    def __init__(self, *arguments: str, growing: Path | None = None) -> None:
        """Start the process.

        Args:
            arguments: of the command line, the command first.
            growing: folder that the command fills, so that `written_bytes` can tell how far it is.
        """
        self.growing = growing
        self.started_s = time.monotonic()
        self._folder = tempfile.TemporaryDirectory()  # files for what it says: a full pipe would block it
        self._said, self._complaints = (Path(self._folder.name) / name for name in ("said", "complaints"))
        with self._said.open("wb") as out, self._complaints.open("wb") as errors:
            self._process = subprocess.Popen(
                command_of(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                env=worker_environment(),
            )
        # Reaped by a thread of its own, so that it leaves no zombie where nobody asks for the answer.
        threading.Thread(target=self._process.wait, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it is still at work."""
        return self._process.poll() is None

    @property
    def written_bytes(self) -> int:
        """What lies in the folder that it fills, 0 before it has one."""
        found = self.growing.rglob("*") if self.growing is not None else ()
        total = 0
        for path in found:
            try:
                total += path.stat().st_size if path.is_file() else 0
            except OSError:  # moved to its place between the two looks
                continue
        return total

    def wait(self) -> tuple[str, ...]:
        """Return the lines of its answer once it has ended.

        Raises:
            EngineError: it said what is wrong.
            WorkerError: it ended without a word for people.
        """
        status = self._process.wait()
        said, complaints = (_lines(path) for path in (self._said, self._complaints))
        if status == 0:
            return said
        sentences = [line.removeprefix(_ERROR) for line in complaints if line.startswith(_ERROR)]
        if sentences:
            raise EngineError(" ".join(sentences))
        last = complaints[-1] if complaints else f"exit status {status}"
        raise WorkerError(f"The process ended before its answer: {last}")


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8", errors="replace").strip().splitlines())
