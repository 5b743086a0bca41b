"""The run folder, which is the only truth about a run: create, list, read, reconcile, delete. Never torch.

spec.yaml      what was asked           events.jsonl  what happened, append-only
plan.json      what was predicted       status.json   where it stands, replaced atomically
output.log     the worker's stdout      control/      requests: stop, checkpoint
checkpoints/   <step>/ to go on from    delta/        the result
report.json    the figures at the end   lock          held by the worker as its sign of life
"""

import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import filelock

from engine.errors import RunError
from engine.events import LIVE_STATES, Record, RunState, from_line
from engine.hardware import Device
from engine.spec import RunSpec
from engine.spec_io import dump_spec, load_values, parse_spec

Request = Literal["stop", "checkpoint"]
_STARTED = "---- worker started"
START_GRACE_S = 30.0  # a queued run without a worker for longer than this never started


@dataclass(frozen=True)
class Run:
    """One execution of a spec; everything about it lies in its folder."""

    path: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def events_path(self) -> Path:
        """The file of events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        """Standard output and error of the worker."""
        return self.path / "output.log"

    @property
    def lock_path(self) -> Path:
        """Held by the worker for as long as it lives."""
        return self.path / "lock"

    @property
    def checkpoints_path(self) -> Path:
        """A folder a step."""
        return self.path / "checkpoints"

    @property
    def delta_path(self) -> Path:
        """The result of a finished or stopped run."""
        return self.path / "delta"


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. `detail` is the sentence of a failure, or what the worker does while it prepares."""

    state: RunState
    pid: int | None = None
    create_time: float | None = None
    seq: int = 0
    step: int = 0
    total_steps: int = 0
    remaining_s: float | None = None
    detail: str = ""
    updated_s: float = 0.0

    @property
    def is_live(self) -> bool:
        """Whether a worker is expected to be at work."""
        return self.state in LIVE_STATES


def create_run(spec: RunSpec, plan: dict[str, Any] | None = None) -> Run:
    """Make the folder of a new, queued run under `spec.output`.

    Local paths of the spec are stored absolute, so that the worker finds them from wherever it starts.

    Args:
        spec: what was asked.
        plan: the plan as plain data, kept for the report.

    Raises:
        RunError: the spec names no dataset, or the folder cannot be made.
    """
    if not spec.dataset:
        raise RunError("dataset is missing: name a file, a folder, a bundled dataset such as demo/pirate, or a Hub id.")
    root = Path(spec.output).expanduser().absolute()
    spec = spec.model_copy(
        update={"output": str(root), "model": _absolute(spec.model), "dataset": _absolute(spec.dataset)}
    )
    try:
        path = _new_folder(root, f"{datetime.now():%Y%m%d-%H%M%S}-{spec.method}-{Path(spec.model).name}")
        (path / "control").mkdir()
        (path / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
        write_json(path / "plan.json", plan or {})
        run = Run(path)
        write_status(run, RunStatus("queued"))
    except OSError as error:
        raise RunError(f"{_unwritable(root, error)} Set output=FOLDER.") from None
    return run


def _unwritable(root: str | Path, error: OSError) -> str:
    return f"The runs folder {str(root)!r} cannot be written: {error.strerror}."


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _new_folder(root: Path, stem: str) -> Path:
    for number in range(1, 1000):
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(stem)


def open_run(name: str | Path, root: str | Path = "runs") -> Run:
    """Return the run that `name` means: a folder, or an id under `root`.

    Raises:
        RunError: there is none.
    """
    for path in (Path(root) / name, Path(name)):
        if (path / "spec.yaml").is_file():
            return Run(path.absolute())
    raise RunError(
        f"There is no run {str(name)!r} under {str(Path(root).absolute())!r}. `python -m engine runs` lists them."
    )


def list_runs(root: str | Path = "runs") -> list[Run]:
    """Return the runs under `root`, newest first."""
    found = [Run(path.parent.absolute()) for path in Path(root).glob("*/spec.yaml")]
    return sorted(found, key=lambda run: run.id, reverse=True)


def read_spec(run: Run) -> RunSpec:
    """Return the spec of a run.

    Raises:
        InvalidSpecError: the file was damaged, or another version wrote it.
    """
    return parse_spec(load_values(run.path / "spec.yaml"))


def read_plan(run: Run) -> dict[str, Any]:
    """Return the plan made before the run; empty where there is none."""
    return read_json(run.path / "plan.json")


def read_report(run: Run) -> dict[str, Any]:
    """Return the report of an ended run; empty before."""
    return read_json(run.path / "report.json")


def read_status(run: Run) -> RunStatus:
    """Return where a run stands."""
    return RunStatus(**read_json(run.path / "status.json") or {"state": "failed", "detail": "status.json is missing."})


def write_status(run: Run, status: RunStatus) -> None:
    """Replace the status atomically, stamped with the time."""
    write_json(run.path / "status.json", asdict(replace(status, updated_s=time.time())))


def read_events(run: Run, since: int = 0) -> tuple[list[Record], int]:
    """Return the events that follow byte `since` of the file, and the position to go on from.

    A line that is still being written is left for the next call; one that another version wrote and this one cannot
    read is passed over.
    """
    try:
        with run.events_path.open("rb") as file:
            file.seek(since)
            content = file.read()
    except FileNotFoundError:
        return [], since
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for line in whole.decode(errors="replace").split("\n"):
        with suppress(ValueError, KeyError):
            records.append(from_line(line))
    return records, since + len(whole)


def log_tail(run: Run, lines: int = 20) -> str:
    """Return the last lines of the worker's output."""
    if not run.log_path.exists():
        return ""
    return "\n".join(run.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def mark_start(run: Run) -> None:
    """Note in the worker's log that what follows is another attempt's."""
    with run.log_path.open("a", encoding="utf-8") as log:
        log.write(f"{_STARTED} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")


def last_words(run: Run) -> str:
    """Return the last line of the newest worker's output that has a word; torchrun ends with a ruled line."""
    lines = itertools.takewhile(lambda line: not line.startswith(_STARTED), reversed(log_tail(run).splitlines()))
    return next((line.strip() for line in lines if any(letter.isalnum() for letter in line)), "")


def send_request(run: Run, request: Request) -> None:
    """Ask the worker to stop after the step it is in, or to write a checkpoint now."""
    (run.path / "control" / request).touch()


def take_request(run: Run, request: Request) -> bool:
    """Return whether `request` was asked for since the last call, and clear it."""
    try:
        (run.path / "control" / request).unlink()
    except FileNotFoundError:
        return False
    return True


def run_lock(run: Run) -> filelock.FileLock:
    """Return the lock that the worker of `run` holds while it lives."""
    return filelock.FileLock(run.lock_path)


def device_lock(root: Path, name: str) -> filelock.FileLock:
    """Return the lock that a run of those in `root`, a chat or a measurement holds while it uses the device."""
    return filelock.FileLock(root / f".{name.replace(':', '-')}.lock")


def take_lock(lock: filelock.FileLock) -> bool:
    """Take `lock` where nobody has it; return whether it was taken."""
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    return True


def require_idle(device: Device, root: str | Path) -> None:
    """Do nothing where `device` is the CPU, or no run in `root` is at work.

    Raises:
        RunError: one is, and may need all memory of the GPU.
    """
    if not device.is_cpu and any(has_worker(run) for run in list_runs(root)):
        raise RunError(f"A run is at work on {device.label}. Wait for it to end.")


@contextmanager
def device_held(device: Device, root: str | Path) -> Iterator[None]:
    """Hold the lock of `device` meanwhile, so that runs in `root` wait, and chats with their results take the CPU.

    Raises:
        RunError: a run, a chat or a measurement has it, or the folder cannot be written.
    """
    require_idle(device, root)
    lock = device_lock(Path(root), device.name)
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        taken = take_lock(lock)
    except OSError as error:
        raise RunError(_unwritable(root, error)) from None
    if not taken:
        raise RunError(f"A chat or a measurement is at work on {device.label}. Close it, or wait for it to end.")
    try:
        yield
    finally:
        lock.release()


def has_worker(run: Run) -> bool:
    """Return whether a process holds the run's lock.

    The look takes a shared lock, so that many may look at once without taking each other for a worker.
    """
    try:
        with run.lock_path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def latest_checkpoint(run: Run) -> Path | None:
    """Return the folder of the newest whole checkpoint, or None."""
    steps = [path for path in run.checkpoints_path.glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def reconcile(root: str | Path = "runs") -> list[Run]:
    """Mark runs as failed that say they are alive and whose worker is gone; return those."""
    lost = []
    for run in list_runs(root):
        status = read_status(run)
        fresh = status.state == "queued" and time.time() - status.updated_s < START_GRACE_S
        if not status.is_live or fresh or has_worker(run):
            continue
        if read_status(run) != status:  # it ended between the two looks
            continue
        tail = last_words(run)
        detail = "The worker ended without a word."
        detail += " Resume the run to go on from its newest checkpoint." if latest_checkpoint(run) else ""
        detail += f" Last line of its log: {tail}" if tail else ""
        write_status(run, replace(status, state="failed", detail=detail))
        lost.append(run)
    return lost


def delete_run(run: Run) -> None:
    """Delete the folder of an ended run.

    Raises:
        RunError: its worker is alive.
    """
    if has_worker(run):
        raise RunError(f"Run {run.id} is still {read_status(run).state}. Stop it first.")
    shutil.rmtree(run.path)


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(body, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it is not there, damaged or no object."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
