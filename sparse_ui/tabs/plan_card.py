"""The card of the plan in Setup: what a run will need, what would make it fit, and the button that starts it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from engine import workers
from engine.errors import EngineError
from engine.planner.cards import CARDS
from engine.planner.plan import make_plan
from engine.planner.row_lengths import known_lengths, why_uncounted
from engine.spec import RunSpec, about
from sparse_ui import cards, form
from sparse_ui.chat_desk import ChatDesk
from sparse_ui.context import AppContext
from sparse_ui.messages import explain
from sparse_ui.plan_view import REMEDY_ROWS, FitView, view_fit, view_plan

# Gradio tells a change that waited for an answer once more when it comes: what is of these very values stays.
_CLEAR = """(...values) => {
  const now = JSON.stringify(values), same = window.stLastForm === now, update = {__type__: "update"};
  window.stLastForm = now;
  return same ? [update, update, update] : ["", "", {...update, visible: false}];
}"""
STARTING = '<div class="soft">Starting: the plan is checked, then the run begins.</div>'
SET_ALONE = ("dataset", "density", "budget_gib")  # by an upload, by a slider
QUIET: dict[str, Any] = {"show_progress": "hidden"}
Found = tuple[FitView, tuple[Any, ...]]  # what a fit found, and the card and the values of the form it is of


@dataclass(frozen=True)
class PlanCard:
    """The parts of the card. Each remedy is a row, its line and its button."""

    body: gr.HTML
    remedies: list[tuple[gr.Row, gr.HTML, gr.Button]]
    changes: gr.State
    plan_for: gr.Dropdown
    start: gr.Button
    fit: gr.Button
    fitted: gr.HTML
    apply: gr.Button
    fit_found: gr.State
    said: gr.HTML
    fits: gr.HTML
    learnt: gr.State


def wire_plan_card(
    context: AppContext,
    card: PlanCard,
    widgets: dict[str, Any],
    facts: list[gr.HTML],
    measured: gr.State,
    filled: list[Any],
) -> None:
    """Wire the card to the form: the plan is made anew at every change, and again when more was found out.

    Args:
        context: of the app.
        card: drawn.
        widgets: of the form, by name.
        facts: where facts of the model, words of the density and words of the budget go.
        measured: changes when this computer was measured.
        filled: the events that fill the whole form.
    """
    output = str(context.settings.runs_root)
    fields = [widgets[name] for name in form.WIDGETS]
    shown: list[Any] = [card.body, card.changes, card.fits, *facts]
    shown += [part for row, line, _ in card.remedies for part in (row, line)]

    def show_plan(chosen: str, *values: Any) -> list[Any]:
        view = view_plan(values, output, chosen)
        updates: list[Any] = [view.card, [remedy.changes for remedy in view.remedies], view.fits]
        updates.append(f"<span>{escape(view.model_facts)}</span>")
        updates.append(cards.measure(about("density").label, view.density_words))
        updates.append(cards.measure(about("budget_gib").label, view.budget_words))
        for remedy in view.remedies:
            updates += [gr.update(visible=True), cards.remedy_line(remedy)]
        return updates + [gr.update(visible=False), ""] * (REMEDY_ROWS - len(view.remedies))

    found = [card.fitted, card.apply]
    by_fit = card.apply.click(_apply_fit(output), [card.fit_found, *fields], fields, **QUIET)
    by_remedy = [
        button.click(_apply(number, output), [card.changes, *fields], fields, **QUIET)
        for number, (_, _, button) in enumerate(card.remedies)
    ]
    fitting = card.fit.click(_fit(context), [card.plan_for, *fields], card.fit_found, **QUIET)
    fitting.then(_show_fit, [card.fit_found, card.plan_for, *fields], found, **QUIET)
    # A fill comes once, not once a field: a field of its own tells of a change by hand, or by what sets it alone.
    by_hand = [card.plan_for.input, measured.change, card.learnt.change]
    by_hand += [widget.change if name in SET_ALONE else widget.input for name, widget in widgets.items()]
    planned = {"fn": show_plan, "inputs": [card.plan_for, *fields], "outputs": shown, **QUIET}
    # In the page, so at once: what Start or the fit said was of other values, what either says later is of these.
    cleared = {"fn": None, "js": _CLEAR, "inputs": [card.plan_for, *fields], **QUIET}
    cleared["outputs"] = [card.said, card.fitted, card.apply]
    gr.on(by_hand, **cleared)
    closer = {"fn": _look_closer(context), "inputs": [card.learnt, card.plan_for, *fields], "outputs": card.learnt}
    closer |= {"trigger_mode": "always_last", **QUIET}  # it takes a second, and only the last is of what stands there
    gr.on(by_hand, trigger_mode="always_last", **planned).then(**closer)
    for event in (*filled, by_fit, *by_remedy):
        event.then(**cleared)
        event.then(**planned).then(**closer)


def draw_plan_card() -> PlanCard:
    """Draw the card, and under it the map of what fits."""
    remedies = []
    with gr.Column(elem_classes="st-stack", elem_id="plan-side"):
        with gr.Column(elem_classes="st-card", elem_id="plan-card"):
            with gr.Row(elem_classes="st-headline"):
                gr.HTML('<div class="st-headline-words"><span></span><span class="soft">Plan for</span></div>')
                offered = [("This computer", ""), *((card.name, card.name) for card in CARDS)]
                plan_for = gr.Dropdown(offered, value="", label="Plan for", show_label=False, elem_id="plan-for")
            body = gr.HTML(elem_id="plan")
            for number in range(REMEDY_ROWS):
                with gr.Row(elem_classes="st-remedy", visible=False) as row:
                    line = gr.HTML()
                    button = gr.Button("Apply", size="sm", elem_id=f"remedy-{number + 1}")
                remedies.append((row, line, button))
            with gr.Row(elem_classes="st-bar"):
                start = gr.Button("Start training", variant="primary", elem_id="start")
                fit = gr.Button("Fit to the budget", elem_id="fit")
            said = gr.HTML(elem_id="start-said", elem_classes="st-said")
            fitted = gr.HTML(elem_id="fit-list", elem_classes="st-said")
            apply = gr.Button("Apply these changes", visible=False, size="sm", elem_id="fit-apply")
        with gr.Column(elem_classes="st-card", elem_id="fits-card"):
            fits = gr.HTML()
    changes, fit_found, learnt = gr.State([]), gr.State(None), gr.State(0)
    return PlanCard(body, remedies, changes, plan_for, start, fit, fitted, apply, fit_found, said, fits, learnt)


def _changed(values: Sequence[Any], spec: RunSpec) -> list[Any]:
    """Return updates that bring the form to `spec`, leaving alone what says so already."""
    return [new if new != old else gr.skip() for old, new in zip(values, form.fill_form(spec), strict=True)]


def _apply(number: int, output: str) -> Callable[..., list[Any]]:
    def apply(changes: list[dict[str, Any]], *values: Any) -> list[Any]:
        if number >= len(changes):
            return [gr.skip()] * len(values)
        return _changed(values, form.read_form(values, output).model_copy(update=changes[number]))

    return apply


def _fit(context: AppContext) -> Callable[..., Found]:
    """Return a handler that lists what would make the run fit, for one click to apply."""

    def fit(chosen: str, *values: Any) -> Found:
        return view_fit(values, str(context.settings.runs_root), context.tracer, chosen), (chosen, *values)

    return fit


def _show_fit(found: Found, *now: Any) -> list[Any]:
    """Show what a fit found, unless the form was changed while it was worked out: then it is of other values."""
    view, asked = found
    if now != asked:
        return ["", gr.update(visible=False)]
    return [view.html, gr.update(visible=view.changes is not None)]


def _look_closer(context: AppContext) -> Callable[..., Any]:
    """Return a handler that finds out what takes seconds, and counts one more where that told something.

    How long the rows of the dataset are, and a trace of a model that the closed forms do not know.
    """

    def look(count: int, chosen: str, *values: Any) -> Any:
        try:
            spec = form.read_form(values, str(context.settings.runs_root))
            before = known(spec, chosen)
        except EngineError:  # the card says what is wrong
            return gr.skip()
        with suppress(EngineError):  # kept for the card; of a process that died, asked again at the next change
            lengths = context.tracer.count(spec)
            if not before[0]:
                context.tracer.plan(spec, chosen or None, lengths)
        with suppress(EngineError):
            return count + 1 if known(spec, chosen) != before else gr.skip()
        return count + 1  # no run can load such a model: the card says so

    def known(spec: RunSpec, chosen: str) -> tuple[Any, ...]:
        """Return what the next plan of `spec` finds out without asking; nothing of it changes by itself."""
        plan = make_plan(spec, with_remedies=False, card=chosen or None, lengths=known_lengths(spec))
        return plan.exact or plan.traced, plan.note, plan.row_lengths, why_uncounted(spec)

    return look


def _apply_fit(output: str) -> Callable[..., list[Any]]:
    def apply(found: Found, *values: Any) -> list[Any]:
        return _changed(values, form.read_form(values, output).model_copy(update=found[0].changes or {}))

    return apply


def wire_start(context: AppContext, card: PlanCard, widgets: dict[str, Any], started: gr.State) -> None:
    """Let the button start a run of what the form says, and put its id into `started`."""
    answer: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": card.said}
    fields = [widgets[name] for name in form.WIDGETS]
    card.start.click(_start(context.chat, str(context.settings.runs_root)), fields, [card.said, started], **answer)


def _start(chat: ChatDesk, output: str) -> Callable[..., Iterator[tuple[str, Any]]]:
    def start(*values: Any) -> Iterator[tuple[str, Any]]:
        yield STARTING, gr.skip()  # a model that has to be traced first takes seconds
        try:
            spec = form.read_form(values, output)
            run = workers.start_run(spec)
            chat.make_room(spec.device)
            yield "", run.id
        except Exception as error:
            yield cards.callout(explain(error, "starting the run").sentences), gr.skip()

    return start
