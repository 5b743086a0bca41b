"""Plans of models whose family no closed form was checked on, by a trace. Torch-free: it reads what was traced.

The figures of a spec that was traced are those of the trace. Those of its neighbours, which remedies, searches and
sliders ask for, are those of the closed forms on the tensors that the model's class has, with what comes and goes
scaled as the newest trace of the model says.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from engine.errors import ModelError
from engine.hardware import Device
from engine.planner.estimate import CPU_MARGINS, CUDA_MARGINS, Plan, estimate
from engine.planner.ledger import MOVING, RESIDENT
from engine.planner.shape import ModelShape, read_shape
from engine.planner.traced import newest_path, read_traced, trace_path, traced, why_refused, why_untraced
from engine.spec import RunSpec


def planned_shape(spec: RunSpec, device: Device) -> ModelShape:
    """Return the shape of the model of `spec`; of an unknown family as a trace of it says, where there was one.

    Raises:
        ModelError: the model cannot be found or its files cannot be read.
        HubUnreachableError: it is on the Hub, which does not answer.
    """
    shape = read_shape(spec.model, spec.model_revision, spec.task)
    if shape.exact:
        return shape
    path = next((path for path in (trace_path(spec, device), newest_path(spec, device)) if path.exists()), None)
    return shape if path is None else _shape_by_trace(shape, path, path.stat().st_mtime_ns, device.is_cpu, device.sm)


@lru_cache(maxsize=16)
def _shape_by_trace(shape: ModelShape, path: Path, _stamp: int, on_cpu: bool, sm: int) -> ModelShape:
    found = read_traced(path)
    if found is None or not found.tensors:
        return shape
    shape = replace(shape, tensors=found.tensors, counted=True)
    device = Device("cpu" if on_cpu else "cuda:0", "", 0, 0, sm)
    formed = estimate(RunSpec(**found.spec), shape, device)
    traced_bytes, formed_bytes = (
        sum(parts[name] for name in MOVING) for parts in (found.figures.peak.parts, formed.parts)
    )
    return replace(shape, moving=traced_bytes / formed_bytes, scaled=True)


def with_trace(plan: Plan, spec: RunSpec, device: Device) -> Plan:
    """Return `plan` with the figures of a trace of `spec` in place of the estimated ones, where it was traced.

    Workspace and context are those of `plan`, but for what kernels take while they run. Upper bound and verdict follow
    what comes and goes, as for families that the closed forms know.

    Raises:
        ModelError: the trace found that such a model cannot be loaded.
    """
    found = traced(spec, device)
    if found is None and (why := why_refused(spec, device)):
        raise ModelError(why)
    if found is None:
        return replace(plan, note=" ".join(filter(None, (plan.note, why_untraced(spec, device)))))
    around = {name: plan.parts[name] for name in ("workspace", "context")}
    parts = {**found.figures.peak.parts, "context": 0}
    parts = {name: num_bytes + around.get(name, 0) for name, num_bytes in parts.items()}
    after = {name: found.figures.after_forward.parts.get(name, 0) for name in parts} | around
    peak, staying = sum(parts.values()), sum(parts[name] for name in RESIDENT)
    low, high = CPU_MARGINS if device.is_cpu else CUDA_MARGINS
    upper = max(int(staying + (peak - staying) * high), found.minimum_bytes + sum(around.values()))
    return replace(
        plan,
        parts=parts,
        peak_bytes=peak,
        lower_bytes=int(staying + (peak - staying) * low),
        upper_bytes=upper,
        phase=found.figures.peak.phase,
        verdict="fits" if upper <= plan.budget_bytes else "tight" if peak <= plan.budget_bytes else "does not fit",
        traced=True,
        note="The formulas were not checked on this family of models; the figures are those of a trace of its code.",
        parts_after_forward=after,
        reserved_bytes=found.reserved_bytes + around["workspace"],
        minimum_bytes=found.minimum_bytes + around["workspace"],
    )
