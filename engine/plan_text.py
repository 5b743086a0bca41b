"""A plan in the terminal: the table, what would make it fit, and the largest spec that does."""

import json
import sys
from dataclasses import asdict

from engine.errors import BudgetError
from engine.planner.fit import LARGEST_FIELDS, Change, Field, Fit
from engine.planner.plan import Plan, fit_sentence, plan_device, plan_table, with_time
from engine.planner.traced_plan import planned_shape
from engine.spec import RunSpec, about
from engine.spec_io import dump_spec
from engine.tracer import Tracer
from engine.units import format_bytes, format_duration


def print_plan(plan: Plan) -> None:
    """Print the parts of the peak, the bounds, the verdict, the time and the remedies."""
    for label, num_bytes in plan_table(plan):
        print(f"{label:<28}{format_bytes(num_bytes):>12}")
    print(f"{'Peak':<28}{format_bytes(plan.peak_bytes):>12}   in the {plan.phase}")
    print(f"{'Between':<28}{format_bytes(plan.lower_bytes):>12}   and {format_bytes(plan.upper_bytes)}")
    print(f"{'Reserved':<28}{format_bytes(plan.reserved_bytes):>12}   at least {format_bytes(plan.minimum_bytes)}")
    if plan.host_bytes:
        print(f"{'Main memory beside it':<28}{format_bytes(plan.host_bytes):>12}")
    print(f"{'Budget':<28}{format_bytes(plan.budget_bytes):>12}   {plan.verdict} ({plan.device})")
    if plan.recomputed:
        print(f"{'Recomputed':<28}{plan.recomputed}")
    if plan.row_lengths is None:
        print(f"{'Rows':<28}{plan.tokens // plan.rows:>12,}   tokens each; Setup and runs know those of the dataset")
    print(time_line(plan))
    if line := exchange_line(plan):
        print(line)
    if plan.note:
        print(plan.note)
    for remedy in plan.remedies:
        saved = f"saves {format_bytes(remedy.saved_bytes)}"
        print(f"  {remedy.title}: {'; '.join(filter(None, (saved, remedy.outcome, remedy.cost)))}")
    if plan.verdict == "does not fit":
        print(fit_sentence(plan))


def say_aside(words: str) -> None:
    """Print on standard error what is no answer."""
    print(words, file=sys.stderr, flush=True)


def time_line(plan: Plan) -> str:
    """Return what a step and the run take, or why that is not known."""
    if plan.step_s is None:
        return plan.rate_note
    step = f"{plan.step_s:.2g} s" if plan.step_s < 10 else format_duration(plan.step_s)
    run = "" if plan.run_s is None else f", the run {format_duration(plan.run_s)}"
    if plan.row_lengths is not None:
        return f"A step takes about {step}{run} ({plan.rate_note})."
    return f"A step of full rows takes about {step}{run} ({plan.rate_note}); shorter rows take less."


def exchange_line(plan: Plan) -> str:
    """Return what several processes do and exchange in a step; nothing of one process."""
    if not plan.exchanged_bytes:
        return ""
    return f"A step has {plan.rows:,} rows; each process exchanges {format_bytes(plan.exchanged_bytes)} in it."


def print_fit(spec: RunSpec, card: str | None, field: Field | None, *, as_json: bool) -> int:
    """Print the largest spec that fits, as YAML with the changes as comments, and its plan; return the exit status.

    Args:
        spec: what is asked.
        card: a card to plan for, or None for this computer.
        field: the one field that is to be as large as fits, the rest as asked; None: a whole spec that fits.
        as_json: one object instead: that of the plan with `spec`, `changes` and, for a whole spec, `largest`.

    Raises:
        BudgetError: nothing makes it fit.
    """
    device = plan_device(spec, card)
    with Tracer(say_aside) as tracer:
        fit = tracer.fit(spec, device) if field is None else _largest_fit(field, spec, card, tracer)
        most = {} if field else {name: tracer.largest(name, fit.spec, device) for name in LARGEST_FIELDS}
    plan = with_time(fit.plan, fit.spec, planned_shape(fit.spec, device), device)
    if as_json:
        body = {
            **plan.to_dict(),
            "spec": fit.spec.model_dump(mode="json"),
            "changes": [asdict(change) for change in fit.changes],
            "largest": most,
        }
        print(json.dumps(body), flush=True)
        return 0
    for line in _change_lines(fit):
        print(f"# {line}")
    print(dump_spec(fit.spec), end="")
    print()
    print_plan(plan)
    for name, value in most.items():
        if value is not None:
            unit = about(name).unit
            figure = f"{value:,}" if isinstance(value, int) else f"{value}"
            print(f"Largest {about(name).label.lower()}, the rest as it is: {figure}{' ' + unit if unit else ''}")
    return 0


def _largest_fit(field: Field, spec: RunSpec, card: str | None, tracer: Tracer) -> Fit:
    found = tracer.largest(field, spec, plan_device(spec, card))
    if found is None:
        raise BudgetError(f"No {about(field).label.lower()} fits with the rest as it is. Use --fit.")
    changes = {field: found} | ({"model_revision": None} if field == "model" else {})
    fitted = spec.model_copy(update=changes)
    plan = tracer.plan(fitted, card)
    change = Change(field, about(field).label, getattr(spec, field), found, "the largest that fits")
    return Fit(fitted, plan, (change,))


def _change_lines(fit: Fit) -> list[str]:
    if not fit.changes:
        return ["fits as it was asked"]
    return [f"{change.field}: {change.before} -> {change.after} ({change.cost})" for change in fit.changes]
