"""What the plan card shows for the values of the form: pure functions of a few milliseconds once a model was read."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from engine.planner.estimate import estimate
from engine.planner.fit import LARGEST_FIELDS
from engine.planner.plan import Plan, Remedy, cut_rows, make_plan, plan_device
from engine.planner.row_lengths import known_lengths, why_uncounted
from engine.planner.traced import why_untraced
from engine.planner.traced_plan import planned_shape
from engine.presets import find_dataset
from engine.spec import SHORTEST_LENGTH, RunSpec, about
from engine.tracer import Tracer
from engine.units import format_bytes, format_count, format_percent
from sparse_ui import cards, form
from sparse_ui.fields import word_of
from sparse_ui.messages import explain

REMEDY_ROWS = 3
TRACING = "A step of this model's own code is being traced; exact figures come in a moment."
ROWS = "For {rows:,} rows of up to {longest:,} tokens, {mean:,.0f} on average, as {known}."
ELSEWHERE = "Start trains on this computer, whatever the plan is for."
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


def view_plan(values: Sequence[Any], output: str, card: str = "") -> PlanView:
    """Return what to show for the values of the form: the plan, or every problem as a sentence.

    Args:
        values: in the order of `form.WIDGETS`.
        output: the folder for runs.
        card: to plan for; empty: this computer.
    """
    try:
        spec = form.read_form(values, output)
        lengths = known_lengths(spec)
        plan = make_plan(spec, card=card or None, lengths=lengths)
        fits = _fits_map(cut_rows(spec, lengths), card)
        pending = _is_pending(spec, plan, card)
    except Exception as error:
        message = explain(error, "the plan")
        return PlanView(cards.title("Plan", message.title) + cards.callout(message.sentences, message.kind))
    said = [TRACING] * pending + [ELSEWHERE] * bool(card)
    if lengths is not None:
        known = "estimated from a part of them" if lengths.estimated else "counted"
        said.insert(0, ROWS.format(rows=lengths.rows, longest=lengths.longest, mean=lengths.mean, known=known))
    elif why := why_uncounted(spec):
        said.insert(0, f"Rows are taken as full, since they were not counted. {why}")
    elif find_dataset(spec.dataset or "") is not None:
        said.insert(0, "Rows are taken as full until the dataset's are counted.")
    return PlanView(
        cards.plan_card(plan) + "".join(f'<div class="soft">{escape(words)}</div>' for words in said),
        shown_remedies(plan.remedies),
        f"{format_percent(plan.num_active / max(1, plan.target_numel))} · {format_count(plan.num_active)} values",
        f"{format_bytes(plan.budget_bytes)} of {format_bytes(plan_device(spec, card or None).total_bytes)}",
        f"{format_count(plan.num_parameters)} parameters · {format_count(plan.target_numel)} in the trained weights",
        fits,
    )


@dataclass(frozen=True)
class FitView:
    """What the button that fits a run shows: HTML, and the changes of the spec; None where nothing is to be applied."""

    html: str
    changes: dict[str, Any] | None = None


def view_fit(values: Sequence[Any], output: str, tracer: Tracer, card: str = "") -> FitView:
    """Return the changes that make the form's run fit, as a list, or what is the most that fits where it does.

    Args:
        values: in the order of `form.WIDGETS`.
        output: the folder for runs.
        tracer: asked about families that the closed forms do not know.
        card: to plan for; empty: this computer.
    """
    try:
        asked = form.read_form(values, output)
        spec, device = cut_rows(asked, known_lengths(asked)), plan_device(asked, card or None)
        fit = tracer.fit(spec, device)
    except Exception as error:
        return FitView(cards.callout(explain(error, "fitting the run").sentences))
    if not fit.changes:
        most = {name: tracer.largest(name, spec, device) for name in LARGEST_FIELDS}
        return FitView(cards.most_that_fits([(about(name).label, _figure(most[name])) for name in LARGEST_FIELDS]))
    lines = [
        (change.label, f"{_figure(change.before)} → {_figure(change.after)}", change.cost) for change in fit.changes
    ]
    heading = f"{len(lines)} change{'' if len(lines) == 1 else 's'}, then {fit.plan.verdict}"
    html = cards.change_list(heading, f"peak {format_bytes(fit.plan.peak_bytes)}", lines)
    return FitView(html, {change.field: change.after for change in fit.changes})


def _figure(value: Any) -> str:
    if value is None:
        return "none fits"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else word_of(str(value))


def shown_remedies(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """Return the cheapest for the rows there are; where none is enough, the first that is takes the last row."""
    first = tuple(remedies[:REMEDY_ROWS])
    for verdict in ("fits", "tight"):
        if any(remedy.verdict == verdict for remedy in first):
            return first
        enough = [remedy for remedy in remedies if remedy.verdict == verdict]
        if enough:
            return (*first[:-1], enough[0])
    return first


def _is_pending(spec: RunSpec, plan: Plan, card: str) -> bool:
    """Return whether a trace will tell more: of a family that the closed forms do not know, not traced yet."""
    if plan.exact or plan.traced:
        return False
    spec = cut_rows(plan.settle(spec), plan.row_lengths)
    return not why_untraced(spec, plan_device(spec, card or None))


def _fits_map(spec: RunSpec, card: str) -> str:
    device = plan_device(spec, card or None)
    shape = planned_shape(spec, device)
    lengths = sorted({max(SHORTEST_LENGTH, spec.sequence_length * 2**power // 4) for power in range(_LENGTHS)})
    rows = []
    for batch in sorted({*_BATCHES, spec.micro_batch_size}):
        changes = [{"sequence_length": length, "micro_batch_size": batch} for length in lengths]
        rows.append((batch, [estimate(spec.model_copy(update=change), shape, device) for change in changes]))
    return cards.fits_map(lengths, rows, (spec.sequence_length, spec.micro_batch_size))
