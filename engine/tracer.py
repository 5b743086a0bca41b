"""Asks for traces from a process of their own: the first takes seconds, as torch is loaded, a further one about one."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from engine.errors import EngineError, WorkerError
from engine.hardware import Device
from engine.planner.traced import Traced, traced
from engine.processes import child_process
from engine.spec import RunSpec
from engine.workers import STOP_TIMEOUT_S


def trace_once(spec: RunSpec, device: Device) -> str:
    """Trace `spec` in a process that ends with it, for the plan to read; return why that could not be done, or nothing.

    Args:
        spec: as `Plan.settle` gives it.
        device: to plan for.
    """
    tracer = Tracer()
    try:
        tracer.trace(spec, device)
    except EngineError as error:
        return str(error)
    finally:
        tracer.close()
    return ""


class Tracer:
    """Traces specs; what was traced before is read from disk, and no process is started for it."""

    def __init__(self) -> None:
        """Begin without a process."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def trace(self, spec: RunSpec, device: Device) -> Traced:
        """Return what a run of `spec` on `device` holds in memory.

        Raises:
            EngineError: the model cannot be built or traced, or no weight is a target.
            WorkerError: the process died.
        """
        known = traced(spec, device)
        if known is not None:
            return known
        with self._lock:
            answer = self._ask({"spec": spec.model_dump(mode="json"), "device": asdict(device)})
        if "error" in answer:
            raise EngineError(answer["error"])
        return Traced.of(answer)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = child_process("trace-worker", errors=sys.stderr)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError("The process that traces ended. Ask again to start a new one.") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError("The process that traces ended before it answered. Ask again to start a new one.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None
