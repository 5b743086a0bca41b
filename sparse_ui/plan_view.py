"""What the plan card shows for the values of the form: pure functions of a few milliseconds once a model was read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.hardware import resolve_device
from engine.planner.estimate import estimate
from engine.planner.plan import Plan, Remedy, make_plan
from engine.planner.shape import read_shape
from engine.spec import RunSpec
from engine.units import format_bytes, format_count, format_percent
from sparse_ui import cards, form
from sparse_ui.messages import explain

REMEDY_ROWS = 3
_LENGTHS = 6  # columns of the map of what fits
_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class PlanView:
    """The plan card in pieces; at most `REMEDY_ROWS` remedies. All but `card` are empty where there is no plan."""

    card: str
    remedies: tuple[Remedy, ...] = ()
    density_words: str = ""
    budget_words: str = ""
    model_facts: str = ""
    fits: str = ""


def view_plan(values: Sequence[Any], output: str) -> PlanView:
    """Return what to show for the values of the form: the plan, or every problem as a sentence.

    Args:
        values: in the order of `form.WIDGETS`.
        output: the folder for runs.
    """
    try:
        spec = form.read_form(values, output)
        plan = make_plan(spec)
        fits = _fits_map(spec, plan)
    except Exception as error:
        message = explain(error, "the plan")
        return PlanView(cards.title("Plan", message.title) + cards.callout(message.sentences))
    return PlanView(
        cards.plan_card(plan),
        tuple(plan.remedies[:REMEDY_ROWS]),
        f"{format_percent(plan.num_active / max(1, plan.target_numel))} · {format_count(plan.num_active)} values",
        f"{format_bytes(plan.budget_bytes)} of {format_bytes(resolve_device(spec.device).total_bytes)}",
        f"{format_count(plan.num_parameters)} parameters · {format_count(plan.target_numel)} in the trained weights",
        fits,
    )


def _fits_map(spec: RunSpec, plan: Plan) -> str:
    device, shape = resolve_device(spec.device), read_shape(spec.model, spec.model_revision, spec.task)
    first = max(8, spec.sequence_length // 4)
    lengths = sorted({spec.sequence_length, *(first * 2**power for power in range(_LENGTHS))})
    rows = []
    for batch in sorted({*_BATCHES, spec.micro_batch_size}):
        changes = [{"sequence_length": length, "micro_batch_size": batch} for length in lengths]
        rows.append((batch, [estimate(spec.model_copy(update=change), shape, device) for change in changes]))
    return cards.fits_map(lengths, rows, (spec.sequence_length, spec.micro_batch_size))
