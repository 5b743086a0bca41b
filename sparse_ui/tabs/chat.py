"""Chat: one question, two answers, of the base model and of the tuned one."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.data.labels import PAIR_SEPARATOR
from engine.runs import Run, read_spec
from engine.workers import Side
from sparse_ui import cards, turns
from sparse_ui.context import AppContext
from sparse_ui.listening import Stops, after_stop, leavable
from sparse_ui.messages import explain, guarded

EXAMPLES = 4
LABELS_HINT = (
    f"This run labels texts: send one, or two with {PAIR_SEPARATOR} between them. The tuned model says how likely each "
    "label is; the base has no trained head to say it with."
)
NO_RESULT = "No run has a result yet. Train one first."
PLACEHOLDERS = {"Base": "Answers first, without the trained values.", "Tuned": "Answers the same question after it."}
Messages = list[dict[str, Any]]
_NOTHING = (gr.skip(), gr.skip(), gr.skip())  # for base, tuned and what is said


@dataclass(frozen=True)
class ChatTab:
    """What the layout wires to other tabs.

    Attributes:
        show: fills `outputs` from the run to show (None: the newest) and the one that `run_id` shows now.
        end: wires a listener to a handler of inputs and outputs that is called once the answer at work has ended.
    """

    tab: gr.Tab
    run_id: gr.Dropdown
    outputs: list[Any]
    show: Callable[[str | None, str | None], list[Any]]
    end: Callable[..., None]


@dataclass(frozen=True)
class _Widgets:
    """What the tab is made of."""

    base: gr.Chatbot
    tuned: gr.Chatbot
    box: gr.Textbox
    send: gr.Button
    said: gr.HTML
    run_id: gr.Dropdown
    tokens: gr.Slider
    warmth: gr.Slider
    examples: list[gr.Button]
    halt: gr.Button
    clear: gr.Button


def build_chat_tab(context: AppContext) -> ChatTab:
    """Build the tab."""
    with gr.Tab("Chat", id="chat") as tab, gr.Row(elem_id="chat-grid", elem_classes="st-grid"):
        widgets = _draw()
    end = _wire(context, widgets)

    @guarded("listing the results")
    def show(wanted: str | None, shown: str | None) -> list[Any]:
        ids = [run.id for run in ready_runs(context)]
        value = wanted if wanted in ids else next(iter(ids), None)
        box = gr.update(choices=ids, value=value)
        if value is not None and shown in (None, value):  # what was asked meanwhile was asked of this very run
            hint = gr.skip() if shown == value else _labels_hint(context, value)
            return [box, gr.skip(), gr.skip(), hint, *_example_updates(context, value)]
        context.chat.close_unless(value)
        none_yet = cards.callout([NO_RESULT], "note")
        return [box, [], [], _labels_hint(context, value) if ids else none_yet, *_example_updates(context, value)]

    outputs = [widgets.run_id, widgets.base, widgets.tuned, widgets.said, *widgets.examples]
    return ChatTab(tab, widgets.run_id, outputs, show, end)


def _draw() -> _Widgets:
    with gr.Column(elem_classes="st-stack"):
        with gr.Row(elem_id="chat-columns", elem_classes="st-grid"):
            base, tuned = (_draw_side(name) for name in ("Base", "Tuned"))
        with gr.Row(elem_id="chat-input"):
            bare: dict[str, Any] = {"show_label": False, "container": False}
            box = gr.Textbox(placeholder="Ask both models", max_lines=6, elem_id="chat-box", **bare)
            send = gr.Button("Send", variant="primary", elem_id="chat-send")
        said = gr.HTML(elem_id="chat-said", elem_classes="st-said")
    with gr.Column(elem_classes="st-card"):
        gr.HTML(cards.title("Result of"))
        run_id = gr.Dropdown([], label="Run", show_label=False, elem_id="chat-run")
        tokens = gr.Slider(8, 1024, value=128, step=8, label="Longest answer, tokens", elem_classes="st-mini")
        warmth = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", elem_classes="st-mini")
        gr.HTML(cards.title("Examples", "held-out questions"))
        examples = [gr.Button(visible=False, size="sm", elem_classes="st-example") for _ in range(EXAMPLES)]
        with gr.Row(elem_classes="st-bar"):
            halt = gr.Button("Stop", variant="stop", size="md", elem_id="chat-stop")
            clear = gr.Button("Clear", size="md", elem_id="chat-clear")
    return _Widgets(base, tuned, box, send, said, run_id, tokens, warmth, examples, halt, clear)


def _wire(context: AppContext, widgets: _Widgets) -> Callable[..., None]:
    """Wire the tab; return what wires whatever ends the answer at work."""
    base, tuned, said, run_id = widgets.base, widgets.tuned, widgets.said, widgets.run_id
    stops = Stops()
    quiet: dict[str, Any] = {"show_progress": "hidden"}

    def answer(
        run_id: str | None, text: str, limit: float, heat: float, left: Messages, right: Messages
    ) -> Generator[Any]:
        yield from _answer(context, run_id, text, (int(limit), float(heat)), left, right)

    @guarded("changing the run")
    def change_run(chosen: str | None) -> list[Any]:
        context.chat.close_unless(chosen)
        return [[], [], _labels_hint(context, chosen), *_example_updates(context, chosen)]

    def end(listener: Callable[..., Any], handler: Callable[..., Any], inputs: Any, outputs: Any) -> None:
        ended = listener(after_stop(handler, stops), inputs, outputs, js=turns.HELD, **quiet)
        for following in (ended.then, ended.failure):
            following(None, js=turns.FREED)

    asked = [run_id, widgets.box, widgets.tokens, widgets.warmth, base, tuned]
    sent = [widgets.box.submit, widgets.send.click]
    gr.on(sent, None, widgets.box, said, js=turns.SENT)
    answered = gr.on(sent, leavable(answer, stops, _NOTHING), asked, [base, tuned, said], js=turns.ASKED, **quiet)
    base.change(None, [base, widgets.box], widgets.box, js=turns.SHOWN)
    for following in (answered.then, answered.failure):
        following(None, js=turns.NEXT)
    for example in widgets.examples:
        filled = example.click(None, [example, widgets.box], [widgets.box, said], js=turns.EXAMPLE)
        filled.then(None, js=turns.NEXT)
    end(widgets.halt.click, lambda: "", None, said)
    widgets.clear.click(None, js=turns.UNASKED)
    end(widgets.clear.click, lambda: ([], [], ""), None, [base, tuned, said])
    # By hand alone: filling the list as the tab opens must not end the answer to a question sent meanwhile.
    end(run_id.input, change_run, run_id, [base, tuned, said, *widgets.examples])
    return end


def ready_runs(context: AppContext) -> list[Run]:
    """Return the runs that have a result to chat with, newest first."""
    return [run for run in context.list_runs() if (run.delta_path / "delta.json").is_file()]


def _draw_side(name: str) -> gr.Chatbot:
    with gr.Column(elem_classes="st-card"):
        gr.HTML(cards.title(name, "as it was" if name == "Base" else "with the trained values"))
        return gr.Chatbot(
            show_label=False,
            container=False,
            height="clamp(280px, 100vh - 310px, 520px)",  # what is said under the box stays in sight
            buttons=[],
            feedback_options=None,
            elem_id=f"chat-{name.lower()}",
            placeholder=PLACEHOLDERS[name],
            layout="bubble",
            render_markdown=False,  # an answer is shown as it was generated, tags and all
            allow_file_downloads=False,
        )


def _labels_hint(context: AppContext, run_id: str | None) -> str:
    run = context.find_run(run_id)
    classifies = run is not None and read_spec(run).task == "classification"
    return cards.callout([LABELS_HINT], "note") if classifies else ""


def _example_updates(context: AppContext, run_id: str | None) -> list[Any]:
    run = context.find_run(run_id)
    answered = context.reader.read(run).last_samples if run else None
    samples = answered.samples if answered else ()
    questions = list(dict.fromkeys(sample.question for sample in samples))[:EXAMPLES]
    shown = [gr.update(value=question, visible=True) for question in questions]
    return shown + [gr.update(visible=False)] * (EXAMPLES - len(shown))


def _answer(
    context: AppContext,
    run_id: str | None,
    text: str,
    how: tuple[int, float],
    left: Messages,
    right: Messages,
) -> Generator[Any]:
    # A question sent before the list of results is there is asked of the one that it will show.
    run = context.find_run(run_id) if run_id else next(iter(ready_runs(context)), None)
    if run is None or not text.strip():
        missing = "That run is gone. Choose another one." if run_id else NO_RESULT
        yield gr.skip(), gr.skip(), gr.skip() if run else cards.callout([missing], "note")
        return
    question = {"role": "user", "content": text.strip()}
    sides: dict[Side, Messages] = {"base": [*left, question], "tuned": [*right, question]}
    asked = {side: _answered(messages) for side, messages in sides.items()}
    answers: dict[Side, str] = {"base": "", "tuned": ""}
    doing = "The base answers first." if context.chat.loaded(run) else "Loading the model. The base answers first."
    yield sides["base"], sides["tuned"], f'<span class="soft">{doing}</span>'
    try:
        for chunk in context.chat.stream(run, asked, *how):
            answers[chunk.side] = chunk.text
            yield *(_with_answer(sides[side], answers[side]) for side in ("base", "tuned")), gr.skip()
        yield gr.skip(), gr.skip(), ""
    except Exception as error:
        kept = (gr.skip(), gr.skip()) if any(answers.values()) else (left, right)  # the question goes back to the box
        yield *kept, cards.callout(explain(error, "the chat").sentences)


def _with_answer(messages: Messages, answer: str) -> Messages:
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages


def _answered(messages: Messages) -> list[dict[str, str]]:
    """Return a conversation as role and text, without the questions that Stop left without an answer."""
    plain = [_plain(message) for message in messages]
    return [
        one
        for one, following in zip(plain, [*plain[1:], None], strict=True)
        if not following or one["role"] != following["role"]
    ]


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """Return a message as role and text; the widget may give its content as a list of parts."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return {"role": message["role"], "content": str(content)}
