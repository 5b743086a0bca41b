"""Asks for traces from a process of their own: the first takes seconds, as torch is loaded, a further one about one."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from typing import Any, Self

from engine.errors import EngineError, WorkerError
from engine.hardware import Device
from engine.planner.fit import Fit, fit_spec
from engine.planner.plan import Plan, cut_rows, make_plan, plan_device
from engine.planner.traced import Traced, traced, why_untraced
from engine.planner.traced_plan import planned_shape, with_trace
from engine.processes import STOP_TIMEOUT_S, child_process
from engine.spec import RunSpec

_ROUNDS = 3  # of trace and plan: what is recomputed, or what fits, may change with what a trace says


def plan_by_trace(spec: RunSpec, *, card: str | None = None, longest_row: int | None = None) -> Plan:
    """Return `Tracer.plan` of a process that ends with it."""
    with Tracer() as tracer:
        return tracer.plan(cut_rows(spec, longest_row), card)


class Tracer:
    """Traces specs; what was traced before is read from disk, and no process is started for it.

    Of several threads one asks at a time. Used in a `with`, it ends its process.
    """

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
        if why := why_untraced(spec, device):
            raise EngineError(why)
        with self._lock:
            answer = self._ask({"spec": spec.model_dump(mode="json"), "device": asdict(device)})
        if "error" in answer:
            raise EngineError(answer["error"])
        return Traced.of(answer)

    def plan(self, spec: RunSpec, card: str | None = None) -> Plan:
        """Return the plan of `spec`, of a family that the closed forms do not know by a trace; its note says why not.

        Args:
            spec: what is asked.
            card: a card to plan for that is not in this computer, by name.

        Raises:
            EngineError: as `make_plan` does.
        """
        plan = make_plan(spec, card=card)
        for _ in range(_ROUNDS):
            if plan.exact or plan.traced:
                break
            try:
                self.trace(plan.settle(spec), plan_device(spec, card))
            except EngineError as error:
                return plan if str(error) in plan.note else replace(plan, note=f"{plan.note} {error}")
            plan = make_plan(spec, card=card)
        return plan

    def fit(self, spec: RunSpec, device: Device) -> Fit:
        """Return `fit_spec` of `spec`; of a family that the closed forms do not know, a trace has to agree.

        Raises:
            BudgetError: nothing makes it fit.
        """
        fit = fit_spec(spec, planned_shape(spec, device), device)
        for _ in range(_ROUNDS):
            if fit.plan.exact:
                break
            settled = fit.plan.settle(fit.spec)
            try:
                self.trace(settled, device)
            except EngineError:
                break
            plan = with_trace(fit.plan, settled, device)
            if plan.verdict == "fits":
                return replace(fit, plan=plan)
            fit = fit_spec(spec, planned_shape(settled, device), device)
        return fit

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, if there is one."""
        self.close()

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
