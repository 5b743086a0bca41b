"""Asks for traces from a process of their own: the first takes seconds, as torch is loaded, a further one about one."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from select import select
from typing import Any, Self

from engine.errors import EngineError, ModelError, WorkerError
from engine.hardware import Device
from engine.planner.estimate import estimate
from engine.planner.fit import Field, Fit, fit_spec, largest
from engine.planner.plan import Plan, cut_rows, make_plan, plan_device
from engine.planner.row_lengths import RowLengths, keep_uncounted, known_lengths, why_uncounted
from engine.planner.traced import Traced, keep_failure, traced, why_untraced
from engine.planner.traced_plan import planned_shape, with_trace
from engine.presets import find_dataset
from engine.processes import STOP_TIMEOUT_S, child_process
from engine.spec import RunSpec

_PATIENCE_S = 60.0  # for one answer
_IDLE_S = 60.0  # then its process ends: it holds half a GiB
_ROUNDS = 3  # of trace and plan: what is recomputed, or what fits, may change with what a trace says


def plan_by_trace(
    spec: RunSpec,
    *,
    card: str | None = None,
    lengths: RowLengths | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return `Tracer.plan` of a process that ends with it."""
    with Tracer(told) as tracer:
        return tracer.plan(spec, card, lengths)


class Tracer:
    """Traces specs and counts tokens; what was found before is read from disk, and no process is started for it.

    Of several threads one asks at a time. Used in a `with`, it ends its process.
    """

    def __init__(self, told: Callable[[str], None] = lambda _: None) -> None:
        """Begin without a process; `told` what takes seconds."""
        self._told = told
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._idle: threading.Timer | None = None

    def trace(self, spec: RunSpec, device: Device) -> Traced:
        """Return what a run of `spec` on `device` holds in memory.

        Raises:
            ModelError: no run can load such a model.
            EngineError: it cannot be traced, or not in time, or no weight is a target.
            WorkerError: the process died.
        """
        known = traced(spec, device)
        if known is not None:
            return known
        if why := why_untraced(spec, device):
            raise EngineError(why)
        self._told("A step of this model's own code is traced, for exact figures ...")
        try:
            answer = self._ask({"spec": spec.model_dump(mode="json"), "device": asdict(device)})
        except TimeoutError:
            why = f"A trace of its code takes longer than {_PATIENCE_S:.0f} s."
            keep_failure(spec, device, why)
            raise EngineError(why) from None
        if "refused" in answer:
            raise ModelError(answer["refused"])
        if "error" in answer:
            raise EngineError(answer["error"])
        return Traced.of(answer)

    def count(self, spec: RunSpec) -> RowLengths | None:
        """Return how long the rows of a run of `spec` are; None of a dataset on the Hub, or that cannot be counted.

        Raises:
            WorkerError: the process died.
        """
        if find_dataset(spec.dataset or "") is not None and known_lengths(spec) is None and not why_uncounted(spec):
            try:
                self._ask({"spec": spec.model_dump(mode="json")})
            except TimeoutError:
                keep_uncounted(spec, f"That takes longer than {_PATIENCE_S:.0f} s.", passes=True)
        return known_lengths(spec)

    def plan(self, spec: RunSpec, card: str | None = None, lengths: RowLengths | None = None) -> Plan:
        """Return the plan of `spec`, of a family that the closed forms do not know by a trace; its note says why not.

        Args:
            spec: what is asked.
            card: a card to plan for that is not in this computer, by name.
            lengths: of the dataset's rows, where they were counted.

        Raises:
            EngineError: as `make_plan` does.
        """
        plan, why = make_plan(spec, card=card, lengths=lengths), ""
        for _ in range(_ROUNDS):
            if plan.exact or plan.traced or why:
                break
            why = self._why_not(cut_rows(plan.settle(spec), lengths), plan_device(spec, card))
            plan = make_plan(spec, card=card, lengths=lengths)
        return plan if why in plan.note else replace(plan, note=f"{plan.note} {why}")

    def fit(self, spec: RunSpec, device: Device) -> Fit:
        """Return `fit_spec` of `spec`; of a family that the closed forms do not know, a trace has to agree.

        Raises:
            BudgetError: nothing makes it fit.
            ModelError: no run can load such a model.
        """
        fit = fit_spec(spec, planned_shape(spec, device), device)
        best = fit
        for _ in range(_ROUNDS):
            if fit.plan.exact:
                break
            settled = fit.plan.settle(fit.spec)
            failed = self._why_not(settled, device)
            checked = replace(fit, plan=with_trace(fit.plan, settled, device))
            if checked.plan.verdict == "fits" or not best.plan.traced:
                best = checked
            if failed:
                break
            fit = fit_spec(spec, planned_shape(settled, device), device)
            if fit.spec == checked.spec:
                break
        return best

    def largest(self, field: Field, spec: RunSpec, device: Device) -> Any:
        """Return `fit.largest` of `spec`; of a family that the closed forms do not know, a trace there has to agree."""
        shape = planned_shape(spec, device)
        found = largest(field, spec, shape, device)
        if shape.exact or field == "model":
            return found
        for _ in range(_ROUNDS):
            if found is None:
                break
            there = self._settled(spec.model_copy(update={field: found}), device)
            before, found = found, largest(field, spec, planned_shape(there, device), device)
            if found == before:
                break
        asked, here = getattr(spec, field), self._settled(spec, device)
        plan = with_trace(estimate(here, planned_shape(here, device), device), here, device)
        return asked if plan.verdict == "fits" and (found is None or found < asked) else found

    def _settled(self, spec: RunSpec, device: Device) -> RunSpec:
        """Trace `spec`, where that can be done, with what its plan leaves open decided, and return it."""
        settled = estimate(spec, planned_shape(spec, device), device).settle(spec)
        self._why_not(settled, device)
        return settled

    def _why_not(self, spec: RunSpec, device: Device) -> str:
        """Trace `spec` for plans to read, and return nothing, or why that could not be done.

        Raises:
            ModelError: no run can load such a model.
        """
        try:
            self.trace(spec, device)
        except ModelError:
            raise
        except EngineError as error:
            return str(error)
        return ""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, if there is one."""
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._wait_no_longer()
            if self._process is None or self._process.poll() is not None:
                self._process = child_process("trace-worker", errors=sys.stderr)
            answer = _asked(self._process, request)
            self._idle = threading.Timer(_IDLE_S, self.close)
            self._idle.daemon = True
            self._idle.start()
            return answer

    def _wait_no_longer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def close(self) -> None:
        """End the process, if there is one; the next question starts another."""
        with self._lock:
            self._wait_no_longer()
            if self._process is None:
                return
            process, self._process = self._process, None
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _asked(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """Return what the process answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise WorkerError("The process that traces ended. Ask again to start a new one.") from None
    if not select([process.stdout], [], [], _PATIENCE_S)[0]:  # one line is asked for, so none waits in a buffer
        process.kill()
        raise TimeoutError
    line = process.stdout.readline()
    if not line:
        raise WorkerError("The process that traces ended before it answered. Ask again to start a new one.")
    answer: dict[str, Any] = json.loads(line)
    return answer
