"""The plan of a run on this computer or a card: peak memory by part, whether it fits, what would make it fit."""

import math
from dataclasses import replace

from engine.errors import BudgetError, DeviceError, TargetsError
from engine.hardware import Device, list_gpus, main_memory_bytes, resolve_device
from engine.planner.calibration import calibrated, rate_for
from engine.planner.cards import card_device
from engine.planner.estimate import Plan, Remedy, estimate
from engine.planner.remedies import find_remedies
from engine.planner.row_lengths import RowLengths
from engine.planner.shape import ModelShape, require_places
from engine.planner.traced_plan import planned_shape, with_trace
from engine.planner.workload import dtype_of
from engine.spec import BASELINES, SHORTEST_LENGTH, RunSpec
from engine.units import format_bytes

__all__ = ["HOW_TO_MEASURE", "LABELS", "Plan", "Remedy", "make_plan", "plan_device", "plan_table", "require_fit"]

LABELS = {
    "parameters": "Base weights",
    "values": "Values, replaced entries",
    "indices": "Positions of the values",
    "gradients": "Gradient of the values",
    "optimizer_states": "Optimizer states",
    "saved_activations": "Saved activations",
    "transients": "Comes and goes at the peak",
    "workspace": "Library workspaces",
    "context": "Process or CUDA context",
}
HOW_TO_MEASURE = "`python -m engine calibrate` measures one."
_REMEDIES_IN_SENTENCE = 2


def plan_device(spec: RunSpec, card: str | None = None) -> Device:
    """Return the device to plan for: the card of this name, else the spec's own device, with what a probe measured.

    Raises:
        DeviceError: there is no such card, or the device is not here, or there are fewer of them than processes.
    """
    if card is not None:
        return card_device(card)
    device, cards = resolve_device(spec.device), len(list_gpus())
    if not device.is_cpu and spec.num_processes > cards:
        raise DeviceError(
            f"num_processes must be at most {cards}, the GPUs of this computer, got {spec.num_processes}. Lower it, or "
            "raise gradient_accumulation instead."
        )
    return calibrated(device)


def make_plan(
    spec: RunSpec, *, with_remedies: bool = True, card: str | None = None, lengths: RowLengths | None = None
) -> Plan:
    """Return the plan of `spec` on this computer or a card, in milliseconds once the model's shape was read.

    Of a family that the closed forms do not know, the figures are those of a trace where there was one.

    Args:
        spec: what is asked.
        with_remedies: whether to look for what would make it fit; some twenty plans more.
        card: a card to plan for that is not in this computer, by name; see `cards.CARDS`.
        lengths: of the dataset's rows, where they were counted: no batch is longer, and a step takes less time.

    Raises:
        ModelError: the model cannot be found or read.
        HubUnreachableError: it is on the Hub, which does not answer.
        TargetsError: `targets` match no weight, or have fewer entries than `num_trainable`.
        InvalidSpecError: the model cannot read rows of `sequence_length`.
        DeviceError: the device is not here, or there is no such card.
    """
    asked, device, spec = spec.sequence_length, plan_device(spec, card), cut_rows(spec, lengths)
    shape = planned_shape(spec, device)
    require_places(shape, asked)
    plan = with_time(estimate(spec, shape, device), spec, shape, device, lengths)
    if spec.num_trainable is not None and spec.num_trainable > plan.target_numel and spec.method not in BASELINES:
        raise TargetsError(
            f"num_trainable must be at most {plan.target_numel:,}, the entries of the targets, got "
            f"{spec.num_trainable:,}. Lower it, or name more targets."
        )
    spec = plan.settle(spec)
    if not shape.exact:
        plan = with_trace(plan, spec, device)
    return replace(plan, remedies=find_remedies(spec, shape, device, plan)) if with_remedies else plan


def cut_rows(spec: RunSpec, lengths: RowLengths | None) -> RunSpec:
    """Return `spec` with rows no longer than the dataset's longest, where they were counted."""
    if lengths is None or lengths.longest >= spec.sequence_length:
        return spec
    return spec.model_copy(update={"sequence_length": max(SHORTEST_LENGTH, lengths.longest)})


def with_time(plan: Plan, spec: RunSpec, shape: ModelShape, device: Device, lengths: RowLengths | None = None) -> Plan:
    """Return `plan` with the seconds of a step, and of the run where its steps are known, from a measured rate.

    Where the rows were counted, a step is one of rows of the average length.
    """
    plan = replace(plan, row_lengths=lengths)
    dtype = dtype_of(spec, device)
    rate = rate_for(device, dtype, shape.hidden)
    if rate is None:
        unmeasured = f"No time: no run in {dtype} on a model of about this width was measured on {device.label}. "
        absent = f"No time: it is known only for a device that was measured, and {device.label} is not here."
        return replace(plan, rate_note=unmeasured + HOW_TO_MEASURE if device.here else absent)
    step_s = plan.flops / (rate * (1 if device.is_cpu else spec.num_processes))  # cores are shared, cards are not
    steps = spec.max_steps
    if lengths is not None:
        step_s *= lengths.mean / spec.sequence_length
        steps = steps or math.ceil(spec.epochs * lengths.rows / plan.rows)
    run_s = step_s * steps if steps else None
    rate_note = f"at {rate / 1e12:.3g} TFLOP/s, as measured"
    return replace(plan, step_s=step_s, run_s=run_s, rate_note=rate_note)


def require_fit(plan: Plan) -> None:
    """Do nothing where the peak is within the budget, be it tight, and main memory holds what a GPU run needs of it.

    Raises:
        BudgetError: it is not; the sentence names the remedies.
    """
    if plan.host_bytes > main_memory_bytes():
        raise BudgetError(
            f"This run needs about {format_bytes(plan.host_bytes)} of main memory beside the GPU's and this computer "
            f"has {format_bytes(main_memory_bytes())}. Lower selection_memory_gib, raise reselection_period, or set "
            "offload_states=false."
        )
    if plan.verdict == "does not fit":
        raise BudgetError(fit_sentence(plan))


def fit_sentence(plan: Plan) -> str:
    """Return need, budget and the best remedies in words."""
    need = f"This run needs about {format_bytes(plan.peak_bytes)} and the budget is {format_bytes(plan.budget_bytes)}"
    where = f"That is on {plan.device}."
    if plan.exchanged_bytes and plan.device.endswith("CPU"):
        where = "The processes share main memory: lower num_processes."
    enough = [remedy for remedy in plan.remedies if remedy.outcome]
    if not enough:
        return f"{need}; no change of its settings makes it fit. Choose a smaller model, or raise budget_gib. {where}"
    words = " or ".join(
        f"{remedy.title} (saves {format_bytes(remedy.saved_bytes)})" for remedy in enough[:_REMEDIES_IN_SENTENCE]
    )
    return f"{need}: {words}, or raise budget_gib. {where}"


def plan_table(plan: Plan) -> list[tuple[str, int]]:
    """Return the parts of the peak with their labels, in reading order, bytes; parts of nothing are left out."""
    return [(label, plan.parts[name]) for name, label in LABELS.items() if plan.parts[name]]
