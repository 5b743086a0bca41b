"""Runs: every run with its figures; open, chat, resume, delete, compare, take away."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from engine import runs, workers
from engine.runs import Run
from engine.units import format_bytes
from sparse_ui import cards
from sparse_ui.context import AppContext
from sparse_ui.messages import explain, guarded
from sparse_ui.runs_view import comparison, details, runs_table
from sparse_ui.tabs.takeaway import draw_takeaway, wire_takeaway

TICK_S = 3.0
QUIET: dict[str, Any] = {"show_progress": "hidden"}
_CHOOSE = """
const tell = (event) => {
  const row = event.target.closest("[data-run]"), space = event.key === " ";
  if (!row || (event.type === "keydown" && event.key !== "Enter" && !space)) return;
  if (space) event.preventDefault();  // the page would scroll
  const held = event.ctrlKey || event.metaKey || event.shiftKey;
  trigger("click", {run: row.dataset.run, beside: space || held || event.target.closest(".tick") !== null});
};
element.addEventListener("click", tell);
element.addEventListener("keydown", tell);
"""


@dataclass(frozen=True)
class RunsTab:
    """What the layout wires to other tabs.

    `chosen` holds the ids of the chosen runs, None before anything was chosen; `settle` turns that into the ids meant.
    `show` is called with `chosen` and `page`, and fills `outputs`. `resumed` holds the run that was resumed last.
    """

    tab: gr.Tab
    chosen: gr.State
    page: gr.State
    resumed: gr.State
    open_train: gr.Button
    open_chat: gr.Button
    settle: Callable[[list[str] | None], list[str]]
    show: Callable[[list[str] | None, Any], list[Any]]
    outputs: list[Any]


@dataclass(frozen=True)
class _Actions:
    """The buttons under the table, and the question before a run is deleted."""

    open_train: gr.Button
    open_chat: gr.Button
    resume: gr.Button
    delete: gr.Button
    confirm: gr.Row
    question: gr.HTML
    yes: gr.Button
    no: gr.Button
    asked: gr.State
    said: gr.HTML


def build_runs_tab(context: AppContext) -> RunsTab:
    """Build the tab."""
    with gr.Tab("Runs", id="runs") as tab, gr.Column(elem_classes="st-stack"):
        with gr.Column(elem_classes="st-card"):
            table = gr.HTML(elem_id="runs-table", js_on_load=_CHOOSE)
            actions = _draw_actions()
        with gr.Row(elem_classes="st-grid", elem_id="runs-below", visible=False) as below:
            with gr.Column(elem_classes="st-stack"):
                with gr.Column(elem_classes="st-card"):
                    gr.HTML(cards.title("Loss", "running mean of the chosen runs, held-out dotted"))
                    compare = gr.Plot(
                        show_label=False, container=False, elem_classes="st-plot", elem_id="plot-compare", buttons=[]
                    )
                takeaway = draw_takeaway()
            with gr.Column(elem_classes="st-card"):
                about_run = gr.HTML(elem_id="runs-details")
        timer, page, chosen, resumed = gr.Timer(TICK_S), gr.State(None), gr.State(None), gr.State(None)
    buttons = [actions.open_train, actions.open_chat, actions.resume, actions.delete]
    outputs = [table, below, compare, about_run, *buttons, page]

    def settle(ids: list[str] | None) -> list[str]:
        return [run.id for run in context.list_runs()[:1]] if ids is None else ids

    @guarded("listing the runs")
    def show(ids: list[str] | None, seen: Any) -> list[Any]:
        return _show(context, settle(ids), seen)

    def choose(ids: list[str] | None, event: gr.EventData) -> list[str]:
        """Choose a run alone; by its tick, Space or with a key held, beside others, or no longer."""
        ids, run_id = settle(ids), event.run
        if not event.beside:
            return [run_id]
        return [item for item in ids if item != run_id] if run_id in ids else [*ids, run_id]

    table.click(choose, chosen, chosen, **QUIET).then(show, [chosen, page], outputs, **QUIET)
    timer.tick(show, [chosen, page], outputs, **QUIET)
    built = RunsTab(tab, chosen, page, resumed, actions.open_train, actions.open_chat, settle, show, outputs)
    _wire_actions(context, actions, built)
    wire_takeaway(context, takeaway, chosen, settle)
    return built


def _draw_actions() -> _Actions:
    with gr.Row(elem_classes="st-bar"):
        off: dict[str, Any] = {"size": "md", "interactive": False}
        open_train, open_chat = gr.Button("Open in Train", **off), gr.Button("Chat", elem_id="runs-chat", **off)
        resume, delete = gr.Button("Resume", elem_id="resume", **off), gr.Button("Delete", variant="stop", **off)
    with gr.Row(visible=False, elem_classes="st-bar") as confirm:
        question = gr.HTML()
        yes = gr.Button("Delete for good", variant="stop", size="sm", elem_id="delete-yes")
        no = gr.Button("Keep", size="sm", elem_id="delete-no")
    said = gr.HTML(elem_id="runs-said", elem_classes="st-said")
    return _Actions(open_train, open_chat, resume, delete, confirm, question, yes, no, gr.State(None), said)


def _wire_actions(context: AppContext, actions: _Actions, tab: RunsTab) -> None:
    @guarded("asking before deleting")
    def ask(ids: list[str] | None) -> list[Any]:
        run = context.find_run(next(iter(tab.settle(ids)), None))
        words = f"Delete {escape(run.id)} and its {format_bytes(_size(run))} of files?" if run else ""
        return [gr.update(visible=run is not None), words, run.id if run else None]

    def forget(run_id: str | None) -> list[Any]:
        return [gr.update(visible=False), *_delete(context, run_id)]

    def resume(ids: list[str] | None) -> tuple[str, Any]:
        return _resume(context, tab.settle(ids))

    actions.delete.click(ask, tab.chosen, [actions.confirm, actions.question, actions.asked], **QUIET)
    actions.no.click(lambda: gr.update(visible=False), None, actions.confirm, **QUIET)
    deleted = actions.yes.click(forget, actions.asked, [actions.confirm, actions.said, tab.chosen], **QUIET)
    deleted.then(tab.show, [tab.chosen, tab.page], tab.outputs, **QUIET)
    told: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": actions.said}
    actions.resume.click(resume, tab.chosen, [actions.said, tab.resumed], **told)


def _show(context: AppContext, ids: list[str], seen: Any) -> list[Any]:
    """Return an update for each output; `gr.skip()` where the page has it already."""
    found, reader = context.list_runs(), context.reader
    chosen = [run for run in found if run.id in ids]
    table = runs_table(reader, found, ids)
    text = details(reader, chosen[-1]) if chosen else ""
    version = (table, text, [reader.read(run).version for run in chosen])
    if version == seen:
        return [gr.skip()] * 9
    return [
        table,
        gr.update(visible=bool(chosen)),
        comparison(reader, chosen) if chosen else None,
        text,
        *(gr.update(interactive=able) for able in _able(chosen)),
        version,
    ]


def _able(chosen: Sequence[Run]) -> tuple[bool, bool, bool, bool]:
    """Return whether the chosen run can be opened, chatted with, resumed and deleted."""
    if len(chosen) != 1:
        return False, False, False, False
    run, status = chosen[0], runs.read_status(chosen[0])
    has_result = (run.delta_path / "delta.json").is_file()
    return True, has_result, status.state in ("stopped", "failed"), not status.is_live


def _resume(context: AppContext, ids: Sequence[str]) -> tuple[str, Any]:
    run = context.find_run(ids[0]) if ids else None
    if run is None:
        return "", gr.skip()
    try:
        workers.start_worker(run)
        context.chat.make_room(runs.read_spec(run).device)
    except Exception as error:
        return cards.callout(explain(error, "resuming the run").sentences), gr.skip()
    return "", (run.id, runs.read_status(run).updated_s)


def _delete(context: AppContext, run_id: str | None) -> tuple[str, list[str]]:
    run = context.find_run(run_id)
    if run is None:
        return "", []
    try:
        context.chat.close_if(run)
        runs.delete_run(run)
        context.reader.forget(run)
    except Exception as error:
        return cards.callout(explain(error, "deleting the run").sentences), [run.id]
    return "", []


def _size(run: Run) -> int:
    return sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
