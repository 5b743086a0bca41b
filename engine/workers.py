"""Start worker processes and talk to them: training, chat, analyses. Never torch, so that the interface can use it.

A training worker lives in a session of its own with its output in a file: it outlives the app. A chat worker speaks
JSON lines over its pipes and ends when they close.
"""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.data.preview import preview_dataset
from engine.errors import DatasetError, EngineError, RunError, WorkerError
from engine.events import DataPrepared
from engine.hardware import resolve_device
from engine.planner.plan import require_fit
from engine.planner.row_lengths import known_lengths, why_refused
from engine.planner.shape import require_weights
from engine.presets import find_dataset
from engine.processes import (
    STOP_TIMEOUT_S,
    child_process,
    command_of,
    training_command,
    training_environment,
    worker_environment,
)
from engine.runs import (
    Run,
    RunStatus,
    create_run,
    delete_run,
    device_held,
    has_worker,
    last_words,
    list_runs,
    mark_start,
    read_events,
    read_report,
    read_spec,
    read_status,
    send_request,
    take_request,
    write_status,
)
from engine.spec import RunSpec
from engine.tracer import plan_by_trace

Side = Literal["base", "tuned"]
NOT_BESIDE_A_RUN = "A run is at work, so the figures would not be this computer's. Measure when it has ended."
START_TIMEOUT_S = 300.0  # a first import of torch from a slow disk takes a minute; a worker that dies is seen at once


def start_worker(run: Run) -> int:
    """Start the worker of `run`, which goes on from the newest checkpoint if there is one.

    Returns:
        The process id, once the worker holds the run's lock.

    Raises:
        RunError: the run has a worker, or is finished.
        WorkerError: the process ended at once.
    """
    if has_worker(run):
        raise RunError(f"Run {run.id} is at work already.")
    if read_status(run).state == "finished":
        raise RunError(f"Run {run.id} is finished. Start a new run to train further.")
    take_request(run, "stop")
    before, count = read_status(run), read_spec(run).num_processes
    write_status(run, RunStatus("queued", step=before.step, total_steps=before.total_steps))
    mark_start(run)
    with run.log_path.open("ab") as log:
        process = subprocess.Popen(
            training_command(run.path, count),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=training_environment(count),
        )
    # Reaped by a thread of its own, so that no zombie stays behind an app that lives for weeks.
    threading.Thread(target=process.wait, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if has_worker(run) or read_status(run).pid == process.pid:
                return process.pid
            if process.poll() is not None:
                break
            time.sleep(0.05)
    except KeyboardInterrupt:  # whoever gives up while it starts does not want it to run
        send_request(run, "stop")
        raise
    process.terminate()  # no run that is called failed goes on
    said = f"The worker ended before it began: {last_words(run) or f'exit status {process.returncode}'}"
    write_status(run, RunStatus("failed", detail=said))
    raise WorkerError(f"Run {run.id}: {said}")


def start_run(spec: RunSpec) -> Run:
    """Plan `spec`, make its run folder and start its worker.

    Raises:
        BudgetError: it does not fit.
        ModelError: the model cannot be found, or has no weights.
        DatasetError: the dataset is on this computer and cannot be read, or has no column to train on, or its rows
            were counted and there is none.
        EngineError: the spec is wrong, or the worker does not start.
    """
    plan = plan_by_trace(spec, lengths=known_lengths(spec))
    require_fit(plan)
    require_weights(spec.model, spec.model_revision)
    if find_dataset(spec.dataset or "") is not None:  # of the Hub nothing is fetched before there is a run to say so
        preview_dataset(spec)
        if why := why_refused(spec):
            raise DatasetError(why)
    run = create_run(spec, plan.to_dict())
    start_worker(run)
    return run


def calibrate(device: str = "auto", root: str | Path = "runs") -> None:
    """Measure a device by a few steps of the demo in a process of their own, for later plans; about a minute.

    Beside a run, be it on another device, steps would take longer; one that begins meanwhile on this device waits.

    Args:
        device: as in a spec.
        root: where the runs lie.

    Raises:
        DeviceError: it is not here.
        RunError: a run is at work, or a chat on this device.
        WorkerError: the process failed.
    """
    if any(has_worker(run) for run in list_runs(root)):
        raise RunError(NOT_BESIDE_A_RUN)
    command = command_of("calibrate-worker", device)
    with device_held(resolve_device(device), root):
        done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise WorkerError(f"The probe of device {device!r} failed: {last}")


def wait_for_end(run: Run, poll_s: float = 0.2) -> RunStatus:
    """Return the status of `run` once its worker is gone."""
    while has_worker(run):
        time.sleep(poll_s)
    return read_status(run)


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Start the process that does what request.json in `folder` asks; yield what it says, the result last.

    Whoever stops listening ends the process. Its standard error goes to output.log in the folder.

    Raises:
        EngineError: it said what is wrong.
        WorkerError: it died.
    """
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen(
            command_of("analysis-worker", str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the caller, who ends it
            env=worker_environment(),
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            body: dict[str, Any] = json.loads(line)
            if "error" in body:
                raise EngineError(body["error"])
            yield body
            if "result" in body:
                return
        raise WorkerError(f"The analysis process ended before its result; {folder / 'output.log'} says why.")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class ChatChunk:
    """The answer of one side so far; `done` with its last piece."""

    side: Side
    text: str
    done: bool


class ChatProcess:
    """A child process that holds the base model and the delta of one run. Made by `start_chat`; one user at a time."""

    def __init__(self, run: Run) -> None:
        """Start the process; it loads the model when it is first asked, and is `loaded` once it has answered."""
        self.run = run
        self.loaded = False
        self._lock = threading.Lock()
        self._log = (run.path / "chat.log").open("ab")
        self._process = child_process("chat-worker", str(run.path), errors=self._log)

    @property
    def alive(self) -> bool:
        """Whether the process can be asked."""
        return self._process.poll() is None

    def stream(
        self,
        history: dict[Side, list[dict[str, str]]],
        max_new_tokens: int = 200,
        temperature: float = 0.0,
    ) -> Iterator[ChatChunk]:
        """Yield the growing answers, the base's first, then the tuned model's.

        A caller that stops listening half-way leaves no trace: the rest of the answer is read and dropped.

        Args:
            history: chat messages of each side to be asked, the last one the user's.
            max_new_tokens: longest answer in tokens.
            temperature: 0 is greedy.

        Raises:
            EngineError: the model or the delta cannot be loaded.
            WorkerError: the process died.
        """
        with self._lock:
            self._send({"history": history, "max_new_tokens": max_new_tokens, "temperature": temperature})
            finished = False
            try:
                for body in self._read():
                    finished = "end" in body or "error" in body
                    if "error" in body:
                        raise EngineError(body["error"])
                    if not finished:
                        self.loaded = True
                        yield ChatChunk(body["side"], body["text"], body["done"])
            finally:
                if not finished and self.alive:
                    self._send({"cancel": True})
                    for _ in self._read():
                        pass

    def _send(self, body: dict[str, Any]) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(body) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise WorkerError("The chat process ended. Send the message again to start a new one.") from None

    def _read(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            body: dict[str, Any] = json.loads(line)
            yield body
            if "end" in body or "error" in body:
                return
        raise WorkerError("The chat process ended in the middle of an answer; chat.log in the run folder says why.")

    def close(self) -> None:
        """End the process and wait for it."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()


def start_chat(run: Run) -> ChatProcess:
    """Return a chat process over the result of `run`.

    Raises:
        RunError: the run has no delta yet.
    """
    if not (run.delta_path / "delta.json").is_file():
        raise RunError(f"Run {run.id} has no result to chat with yet: it is {read_status(run).state}.")
    return ChatProcess(run)


def take_back(run: Run) -> None:
    """Delete `run` where its worker found nothing to train on, so that it never began.

    Raises:
        DatasetError: so it was; the sentence says why.
    """
    status = read_status(run)
    if status.state != "failed" or any(isinstance(each.event, DataPrepared) for each in read_events(run)[0]):
        return
    if status.detail and status.detail == why_refused(read_spec(run)):
        delete_run(run)
        raise DatasetError(status.detail)


def finish_report(run: Run) -> dict[str, Any]:
    """Return the report of an ended run, or what is known of one that failed before it could write it."""
    report = read_report(run)
    status = read_status(run)
    error = {"error": status.detail} if status.state == "failed" else {}
    return {**report, "run": run.id, "state": status.state, **error}
