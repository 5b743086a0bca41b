"""Take it away: the result of a chosen run into a folder, or several results added to a run of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine.runs import Run
from sparse_ui import cards
from sparse_ui.context import AppContext
from sparse_ui.messages import explain, guarded

TICK_S = 1.0
PLACE = "runs"  # where the answers stand
KINDS = {"merged": "Merged model", "peft": "PEFT adapter"}
_HELP = {
    "merged": "A whole model with its tokenizer, for transformers and what is built on it.",
    "peft": "For PeftModel.from_pretrained over the base: of LoRA, IA3, and sparse values over a dense base.",
}
Settle = Callable[[list[str] | None], list[str]]


@dataclass(frozen=True)
class TakeAway:
    """The widgets of the card."""

    kind: gr.Radio
    words: gr.HTML
    folder: gr.Textbox
    export: gr.Button
    add: gr.Button
    said: gr.HTML
    seen: gr.State
    timer: gr.Timer


def draw_takeaway() -> TakeAway:
    """Draw the card."""
    with gr.Column(elem_classes="st-card", elem_id="takeaway"):
        gr.HTML(cards.title("Take it away", "files that other tools load"))
        offered = [(name, kind) for kind, name in KINDS.items()]
        kind = gr.Radio(offered, value="merged", show_label=False, elem_classes="st-seg", elem_id="export-kind")
        words = gr.HTML(_soft(_HELP["merged"]), elem_classes="st-facts")
        folder = gr.Textbox(label="Folder, new or empty", max_lines=1, elem_id="export-folder")
        with gr.Row(elem_classes="st-bar"):
            export = gr.Button("Export", size="md", interactive=False, elem_id="export")
            add = gr.Button("Add these results", size="md", interactive=False, elem_id="add-results")
        said = gr.HTML(elem_id="export-said", elem_classes="st-said")
        return TakeAway(kind, words, folder, export, add, said, gr.State(None), gr.Timer(TICK_S))


def wire_takeaway(context: AppContext, card: TakeAway, chosen: gr.State, settle: Settle) -> None:
    """Wire the card.

    Args:
        context: of the app.
        card: drawn.
        chosen: holds the ids of the chosen runs.
        settle: turns what `chosen` holds into the ids meant.
    """
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    shown = [card.folder, card.export, card.add, card.said, card.seen]

    @guarded("looking at the results")
    def watch(ids: list[str] | None, kind: str, before: Any) -> list[Any]:
        return view_takeaway(context, settle(ids), kind, before)

    def export(ids: list[str] | None, kind: str, folder: str) -> str:
        return start_export(context, settle(ids), kind, folder)

    def add(ids: list[str] | None) -> str:
        return start_compose(context, settle(ids))

    card.export.click(export, [chosen, card.kind, card.folder], card.said, **quiet)
    card.add.click(add, chosen, card.said, **quiet)
    card.kind.change(lambda kind: _soft(_HELP[kind]), card.kind, card.words, **quiet)
    changes = [card.timer.tick, chosen.change, card.kind.change]
    gr.on(changes, watch, [chosen, card.kind, card.seen], shown, **quiet)


def view_takeaway(context: AppContext, ids: Sequence[str], kind: str, before: Any) -> list[Any]:
    """Return an update for each output of the card; `gr.skip()` where the page has it already."""
    ready, busy = _ready(context, ids), context.errands.busy()
    one = ready[0] if len(ids) == len(ready) == 1 else None
    place = str(default_folder(one, kind)) if one else "Choose one run with a result."
    able = one is not None and not busy, len(ids) == len(ready) >= 2 and not busy
    said = context.errands.show(PLACE)
    now = (place, able, said)
    if now == before:
        return [gr.skip()] * 5
    return [gr.update(placeholder=place), *(gr.update(interactive=each) for each in able), said, now]


def default_folder(run: Run, kind: str) -> Path:
    """Return a folder beside the run that is not there yet."""
    first = run.path.with_name(f"{run.id}-{kind}")
    names = (first if number == 1 else first.with_name(f"{first.name}-{number}") for number in range(1, 1000))
    return next((path for path in names if not path.exists()), first)


def start_export(context: AppContext, ids: Sequence[str], kind: str, folder: str) -> str:
    """Start the export of the chosen run in a process of its own.

    Args:
        context: of the app.
        ids: of the chosen runs.
        kind: merged or peft.
        folder: to write into; empty: beside the run.

    Returns:
        HTML: that it has begun, or why not.
    """
    ready = _ready(context, ids[:1])
    if not ready:
        return cards.callout(["Choose a run with a result first."], "note")
    (run,) = ready
    target = Path(folder.strip()).expanduser().absolute() if folder.strip() else default_folder(run, kind)

    def tell(lines: Sequence[str]) -> list[str]:
        return [f"{KINDS[kind]}{lines[-1].removeprefix(kind)}."]

    arguments = ("export", str(run.path), str(target), "--as", kind)
    return _start(context, f"Exporting {run.id}", *arguments, growing=target, tell=tell)


def start_compose(context: AppContext, ids: Sequence[str]) -> str:
    """Start adding the results of the chosen runs; return HTML: that it has begun, or why not."""
    paths = [str(run.path) for run in _ready(context, ids)]
    root = str(context.settings.runs_root)
    return _start(context, f"Adding {len(paths)} results", "compose", *paths, "--runs", root)


def _start(context: AppContext, doing: str, *arguments: str, **how: Any) -> str:
    try:
        context.errands.start(PLACE, doing, *arguments, **how)
    except Exception as error:
        return cards.callout(explain(error, doing).sentences)
    return context.errands.show(PLACE)


def _ready(context: AppContext, ids: Sequence[str]) -> list[Run]:
    return [run for run in context.list_runs() if run.id in ids and (run.delta_path / "delta.json").is_file()]


def _soft(words: str) -> str:
    return f"<span>{words}</span>"
