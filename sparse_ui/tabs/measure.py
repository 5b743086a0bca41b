"""Measure this computer: the probe that makes its plans truer, from a button beside the memory fields of Setup."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine import workers
from engine.errors import DeviceError
from sparse_ui import cards
from sparse_ui.context import AppContext
from sparse_ui.messages import explain, guarded

TICK_S = 1.0
PLACE = "setup"  # where the answer stands
WORDS = "A few steps of the demo, about a minute: plans for this computer become truer and say how long a run takes."
WAITS = workers.NOT_BESIDE_A_RUN


@dataclass(frozen=True)
class Measure:
    """The button and its words. `measured` changes with each measurement."""

    button: gr.Button
    words: gr.HTML
    said: gr.HTML
    measured: gr.State
    seen: gr.State
    timer: gr.Timer


def draw_measure() -> Measure:
    """Draw the button with its words."""
    with gr.Column(elem_classes="st-measurer"):
        with gr.Row(elem_classes="st-bar"):
            button = gr.Button("Measure this computer", size="md", elem_id="measure")
        words = gr.HTML(f"<span>{WORDS}</span>", elem_classes="st-info", elem_id="measure-words")
        said = gr.HTML(elem_id="measure-said", elem_classes="st-said")
        return Measure(button, words, said, gr.State(""), gr.State(None), gr.Timer(TICK_S))


def wire_measure(context: AppContext, card: Measure, device: Any) -> None:
    """Wire the button.

    Args:
        context: of the app.
        card: drawn.
        device: the widget of that field.
    """

    @guarded("looking at the measurement")
    def watch(before: Any) -> list[Any]:
        return view_measure(context, before)

    def measure(named: str) -> str:
        return start_measure(context, named)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    card.button.click(measure, device, card.said, **quiet)
    shown = [card.button, card.words, card.said, card.measured, card.seen]
    card.timer.tick(watch, card.seen, shown, **quiet)


def view_measure(context: AppContext, before: Any) -> list[Any]:
    """Return an update for the button, both lines, `measured` and what the page has; `gr.skip()` where it has it."""
    busy, waits = context.errands.busy(), context.live_run() is not None
    said = context.errands.show(PLACE)
    now = (busy, waits, said)
    if now == before:
        return [gr.skip()] * 5
    answer = gr.skip() if busy else said
    return [
        gr.update(interactive=not busy and not waits),
        f"<span>{WAITS if waits and not busy else WORDS}</span>",
        said,
        answer,
        now,
    ]


def start_measure(context: AppContext, device: str) -> str:
    """Start the probe of a device, as in a spec; return HTML: that it has begun, or why not."""
    doing = "Measuring this computer"
    if context.live_run() is not None:
        return cards.callout([WAITS], "note")
    named = device.strip() or "auto"
    try:
        if not context.errands.busy():
            with suppress(DeviceError):  # which the command says
                context.chat.make_room(named)
        runs = str(context.settings.runs_root)
        context.errands.start(PLACE, doing, "calibrate", "--device", named, "--runs", runs)
    except Exception as error:
        return cards.callout(explain(error, doing).sentences)
    return context.errands.show(PLACE)
