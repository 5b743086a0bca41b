"""The peak memory of one spec on one model and device, by part.

Peak = resident terms + the most that one of four moments adds: the loss, the backward of one block, the optimizer step,
the selection of the trained entries in the first step. The micro-batch is taken as filled to `sequence_length`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.hardware import Device, budget_bytes_of
from engine.planner import formulas, recompute
from engine.planner.duration import step_flops
from engine.planner.moments import after_forward_bytes, host_bytes, run_moments
from engine.planner.row_lengths import RowLengths
from engine.planner.shape import ModelShape
from engine.planner.workload import Workload, build_workload, dtype_of
from engine.spec import RunSpec

Verdict = Literal["fits", "tight", "does not fit"]

# Around what comes and goes. The closed forms lie within 1 percent of a trace of the real classes on the checked
# families; the allocator's rounding and fragments come on top, more of them in the C library's heap. Of eight other
# families the traces lay between 0.76 and 1.27 of the Llama layout's.
CUDA_MARGINS = (0.97, 1.08)
CPU_MARGINS = (0.90, 1.20)
GENERIC_MARGINS = (0.65, 1.40)
# Scaled by a trace of the same model in other settings: of 119 such neighbours, of eleven families, 108 lay within.
SCALED_MARGINS = (0.80, 1.25)
# Around what stays: the counts are exact, the allocator rounds up. Without weights to count, a guess.
RESIDENT_MARGINS = (1.00, 1.01)
# Process, CUDA context and library workspaces differ by machine, driver and build.
SURROUNDINGS_MARGINS = (0.65, 1.35)
MEASURED_MARGINS = (0.90, 1.10)  # where a probe measured them on this device


@dataclass(frozen=True)
class Remedy:
    """A change of the spec that lowers the peak by `saved_bytes`, to `verdict`; `cost` says what it costs."""

    title: str
    saved_bytes: int
    changes: dict[str, Any]
    cost: str
    verdict: Verdict

    @property
    def outcome(self) -> str:
        """`then fits`, `then tight`, or nothing where it is not enough."""
        return "" if self.verdict == "does not fit" else f"then {self.verdict}"


@dataclass(frozen=True)
class Plan:
    """What a run will need on its device. `parts` are bytes at the peak and add up to `peak_bytes`.

    `parts_after_forward`: the same names at the end of a forward, the logits dropped. `reserved_bytes`: what the
    allocator takes from the device at the peak, and `minimum_bytes` the least limit on it under which a step succeeds;
    both without `context`. `recompute` and `recompute_blocks`: as in the spec, or what its auto comes to;
    `recomputed` says in words what of a model's blocks that is. `flops`:
    operations of one optimizer step, over `rows` rows of `tokens` tokens together. `step_s` and `run_s`: seconds, where
    `rate_note` says what rate was measured; None where none was. They are of rows of the average
    of `row_lengths`, where the dataset's were counted; else of full rows. `host_bytes`: main memory that the selection,
    or states and inputs kept there, need beside a run on a GPU. `exact`: whether the closed forms were checked on this
    family of models, `traced`: whether the figures are those of a trace; `note` says so. Of several processes the
    memory is that of each, all else that of the run, and `exchanged_bytes` is what each gives to the others in a step.
    """

    parts: dict[str, int]
    peak_bytes: int
    lower_bytes: int
    upper_bytes: int
    budget_bytes: int
    phase: str
    verdict: Verdict
    remedies: tuple[Remedy, ...]
    device: str
    num_parameters: int
    num_active: int
    target_numel: int
    host_bytes: int
    exact: bool
    traced: bool
    note: str
    parts_after_forward: dict[str, int]
    reserved_bytes: int
    minimum_bytes: int
    flops: float
    rows: int
    tokens: int
    recompute: str
    recompute_blocks: int | None
    recomputed: str
    exchanged_bytes: int
    step_s: float | None = None
    run_s: float | None = None
    rate_note: str = ""
    row_lengths: RowLengths | None = None

    def settle(self, spec: RunSpec) -> RunSpec:
        """Return the spec of the plan with what it left open decided."""
        return spec.model_copy(update={"recompute": self.recompute, "recompute_blocks": self.recompute_blocks})

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {**asdict(self), "remedies": [asdict(remedy) for remedy in self.remedies]}


def estimate(spec: RunSpec, shape: ModelShape, device: Device) -> Plan:
    """Return the plan of `spec` without remedies; where it leaves open what is recomputed, of as little as fits.

    Raises:
        TargetsError: `targets` match no weight.
    """
    tried: dict[tuple[str, int | None], Plan] = {}

    def fits(step: RunSpec) -> bool:
        plan = tried[step.recompute, step.recompute_blocks] = _estimate(step, shape, device)
        return plan.verdict == "fits"

    spec = recompute.resolved(spec, shape.family, shape.layers, fits)
    return tried.get((spec.recompute, spec.recompute_blocks)) or _estimate(spec, shape, device)


def _estimate(spec: RunSpec, shape: ModelShape, device: Device) -> Plan:
    work = build_workload(spec, shape, device)
    resident = _resident(work)
    moment = max(run_moments(work), key=lambda each: each.total)
    saved, transient, kept = (
        int(shape.moving * size) for size in (moment.saved, moment.transient, after_forward_bytes(work))
    )
    surroundings = _surroundings(device, work)
    after = resident | {"saved_activations": kept, "transients": 0} | surroundings
    parts = {part: size - moment.without.get(part, 0) for part, size in resident.items()}
    parts |= {"saved_activations": saved, "transients": transient} | surroundings
    peak, budget = sum(parts.values()), budget_bytes_of(spec.budget_gib, device, spec.num_processes)
    staying = sum(parts[name] for name in resident)
    lower, upper = _bounds(work, staying, saved + transient, device, sum(surroundings.values()))
    allocated, trained = peak - parts["context"], staying - parts["parameters"]
    least = formulas.minimum_bytes(allocated, saved, transient, trained)
    upper = upper if work.on_cpu else max(upper, least + parts["context"])
    rows = spec.micro_batch_size * spec.gradient_accumulation * spec.num_processes
    return Plan(
        parts=parts,
        peak_bytes=peak,
        lower_bytes=lower,
        upper_bytes=upper,
        budget_bytes=budget,
        phase=moment.phase,
        verdict="fits" if upper <= budget else "tight" if peak <= budget else "does not fit",
        remedies=(),
        device=device.label if spec.num_processes == 1 else f"each of {spec.num_processes} x {device.label}",
        num_parameters=shape.num_parameters,
        num_active=sum(work.active.values()),
        target_numel=sum(work.numels.values()),
        host_bytes=0 if work.on_cpu else host_bytes(work),
        exact=shape.exact,
        traced=False,
        note=_note(shape),
        parts_after_forward=after,
        reserved_bytes=formulas.reserved_bytes(allocated, transient, trained),
        minimum_bytes=least,
        flops=step_flops(work),
        rows=rows,
        tokens=rows * spec.sequence_length,
        exchanged_bytes=work.exchanged_bytes,
        recompute=spec.recompute,
        recompute_blocks=spec.recompute_blocks,
        recomputed=recompute.words(work.kept),
    )


def _surroundings(device: Device, work: Workload) -> dict[str, int]:
    own = {"adapters": work.spec.method == "lora", "bfloat16": dtype_of(work.spec, device) == "bfloat16"}
    workspace, context = formulas.workspace_bytes(device.is_cpu, device.sm, **own), device.context_bytes
    if device.workspace_bytes is not None:  # a probe trains no adapters, and on the CPU in fp32
        workspace += device.workspace_bytes - formulas.workspace_bytes(device.is_cpu, device.sm)
    if work.exchanged_bytes and not device.is_cpu:
        workspace += formulas.NCCL_BYTES
    return {
        "workspace": workspace,
        "context": formulas.context_bytes(device.is_cpu) if context is None else context,
    }


def _bounds(work: Workload, resident: int, moving: int, device: Device, surroundings: int) -> tuple[int, int]:
    staying = RESIDENT_MARGINS if work.shape.counted else GENERIC_MARGINS
    checked = CPU_MARGINS if work.on_cpu else CUDA_MARGINS
    unchecked = SCALED_MARGINS if work.shape.scaled else GENERIC_MARGINS
    margins = checked if work.shape.exact else unchecked
    around = SURROUNDINGS_MARGINS if device.context_bytes is None else MEASURED_MARGINS
    low, high = (
        int(resident * staying[side] + moving * margins[side] + surroundings * around[side]) for side in (0, 1)
    )
    return low, high


def _note(shape: ModelShape) -> str:
    if shape.exact:
        return ""
    if not shape.counted:
        return f"Sizes are guessed: there are no weights to count and the family {shape.family!r} is not known."
    return f"The formulas were not checked on models of the family {shape.family!r}, so the range is wide."


def _resident(work: Workload) -> dict[str, int]:
    count, spec = work.num_active, work.spec
    births = formulas.births_bytes(count) if spec.method == "spiel-ma" else 0
    return {
        "parameters": work.parameters_bytes,
        "values": work.values_bytes + work.head_values_bytes,
        "indices": work.indices_bytes,
        "gradients": work.gradients_bytes + work.candidates_bytes,
        "optimizer_states": births + (0 if work.offloaded else work.states_bytes) + work.head_states_bytes,
    }
