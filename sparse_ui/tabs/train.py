"""Train: the run as it goes. A page that opens and a timer call the same snapshot; the run folder is the truth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine import runs
from engine.runs import Request
from sparse_ui import cards
from sparse_ui.context import AppContext
from sparse_ui.messages import explain, guarded
from sparse_ui.train_view import NO_RUN, empty_pieces, pieces_of

TICK_S = 1.0
PLOTS = (
    ("Loss", "train, held-out", "plot-loss"),
    ("Gradient coverage", "trained entries, best of batch", "plot-coverage"),
    ("Memory", "measured, and the plan's band", "plot-memory"),
    ("Where the gradient is", "share of the top 1 percent", "plot-gradient"),
)
_ABSENT = object()


@dataclass(frozen=True)
class TrainTab:
    """What the layout wires to other tabs. `show` is called with a run's id and `page`; it fills `outputs`."""

    tab: gr.Tab
    run_id: gr.Dropdown
    seen: gr.State
    outputs: list[Any]
    show: Callable[[str | None, dict[str, Any]], list[Any]]


def build_train_tab(context: AppContext) -> TrainTab:
    """Build the tab."""
    with gr.Tab("Train", id="train") as tab, gr.Row(elem_id="train-grid", elem_classes="st-grid"):
        with gr.Column(elem_classes="st-stack"):
            with gr.Column(elem_classes="st-card"):
                progress = gr.HTML(elem_id="progress")
            notes = gr.HTML(elem_id="notes", elem_classes="st-said")
            with gr.Row(elem_id="train-plots", elem_classes="st-grid"):
                plots = [_draw_plot(*words) for words in PLOTS]
        with gr.Column(elem_classes="st-stack"):
            with gr.Column(elem_classes="st-card"):
                run_id = gr.Dropdown([], label="Run", show_label=False, elem_id="train-run")
                run_card = gr.HTML(elem_id="run-card")
                with gr.Row(elem_classes="st-bar"):
                    checkpoint = gr.Button("Checkpoint", size="md", interactive=False, elem_id="checkpoint")
                    stop = gr.Button("Stop", variant="stop", size="md", interactive=False, elem_id="stop")
                said = gr.HTML(elem_id="train-said", elem_classes="st-said")
            with gr.Column(elem_classes="st-card"):
                samples = gr.HTML(elem_id="samples")
        timer, seen = gr.Timer(TICK_S), gr.State({})
    outputs = [progress, run_card, notes, samples, *plots, said, run_id, checkpoint, stop, seen]

    @guarded("reading the run")
    def show(chosen: str | None, page: dict[str, Any]) -> list[Any]:
        return _snapshot(context, chosen, page)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    timer.tick(show, [run_id, seen], outputs, **quiet)
    run_id.input(show, [run_id, seen], outputs, trigger_mode="always_last", **quiet)
    checkpoint.click(_ask(context, "checkpoint"), run_id, said, **quiet)
    stop.click(_ask(context, "stop"), run_id, said, **quiet)
    return TrainTab(tab, run_id, seen, outputs, show)


def _draw_plot(name: str, soft: str, elem_id: str) -> gr.Plot:
    with gr.Column(elem_classes=["st-card", "st-plotcard"]):
        gr.HTML(cards.title(name, soft))
        return gr.Plot(show_label=False, container=False, elem_id=elem_id, elem_classes="st-plot", buttons=[])


def _snapshot(context: AppContext, chosen: str | None, page: dict[str, Any]) -> list[Any]:
    """Return an update for each output; `gr.skip()` for what the page has already."""
    found = context.list_runs()
    run = next((item for item in found if item.id == chosen), None) or context.default_run()
    try:
        pieces = pieces_of(run, context.reader.read(run)) if run else empty_pieces(NO_RUN)
    except Exception as error:
        pieces = empty_pieces(cards.callout(explain(error, "reading the run").sentences))
    now: dict[str, Any] = {piece.name: piece.version for piece in pieces}
    updates = [gr.skip() if page.get(piece.name, _ABSENT) == piece.version else piece.draw() for piece in pieces]
    ids = [item.id for item in found]
    live = run is not None and runs.read_status(run).state in ("preparing", "running", "queued")
    now |= {"runs": (ids, run.id if run else None), "live": live}
    same_list, same_live = page.get("runs") == now["runs"], page.get("live", _ABSENT) == live
    updates.append(gr.skip() if same_list else gr.update(choices=ids, value=now["runs"][1]))
    updates += [gr.skip() if same_live else gr.update(interactive=live)] * 2
    return [*updates, gr.skip() if now == page else now]


def _ask(context: AppContext, request: Request) -> Callable[[str | None], str]:
    words = {"stop": "Stopping after this step.", "checkpoint": "A checkpoint will be written after this step."}

    def ask(run_id: str | None) -> str:
        run = context.find_run(run_id)
        if run is None or not runs.read_status(run).is_live:
            return cards.callout(["This run is not at work."], "note")
        runs.send_request(run, request)
        return f'<span class="soft">{words[request]}</span>'

    return ask
