"""A plan from a trace, for models whose family no closed form was checked on. Torch-free: it reads what was traced."""

from dataclasses import replace

from engine.hardware import Device
from engine.planner.estimate import CPU_MARGINS, CUDA_MARGINS, Plan
from engine.planner.ledger import RESIDENT
from engine.planner.traced import traced
from engine.spec import RunSpec


def with_trace(plan: Plan, spec: RunSpec, device: Device) -> Plan:
    """Return `plan` with the figures of a trace of `spec` in place of the estimated ones, where it was traced.

    Workspace and context are those of `plan`, but for what kernels take while they run. Upper bound and verdict follow
    what comes and goes, as for families that the closed forms know.
    """
    found = traced(spec, device)
    if found is None:
        return plan
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
        note="The formulas were not checked on this family of models; the figures are those of a trace of its code.",
        parts_after_forward=after,
        reserved_bytes=found.reserved_bytes + around["workspace"],
        minimum_bytes=found.minimum_bytes + around["workspace"],
    )
