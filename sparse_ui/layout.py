"""The page: header, tabs in order, and what happens between them."""

from typing import Any

import gradio as gr

from sparse_ui import form
from sparse_ui.context import AppContext
from sparse_ui.fields import build_widget
from sparse_ui.header import header_html
from sparse_ui.messages import guarded
from sparse_ui.tabs.chat import ChatTab, build_chat_tab
from sparse_ui.tabs.data import build_data_tab
from sparse_ui.tabs.runs import RunsTab, build_runs_tab
from sparse_ui.tabs.setup import SetupTab, build_setup_tab
from sparse_ui.tabs.train import TrainTab, build_train_tab
from sparse_ui.theme import TOGGLE_THEME

HEADER_S = 2.0
_QUIET: dict[str, Any] = {"show_progress": "hidden"}


def build_app(context: AppContext) -> gr.Blocks:
    """Return the page. It holds no state of a run: `context` reads the run folders."""
    app = gr.Blocks(title="Sparse tuning", analytics_enabled=False, fill_width=True)
    with app:
        _build_header(app, context)
        widgets: dict[str, Any] = {name: build_widget(name) for name in form.WIDGETS}
        for widget in widgets.values():
            widget.unrender()  # each tab draws its own
        with gr.Tabs(selected=context.settings.first_tab, elem_id="tabs") as tabs:
            setup = build_setup_tab(context, widgets, app.load)
            build_data_tab(context, widgets, setup.dataset_facts)
            train = build_train_tab(context)
            chat = build_chat_tab(context)
            past = build_runs_tab(context)
        _wire(app, tabs, setup, train, chat, past)
    for event in app.fns.values():
        event.api_visibility = "private"
    return app


def _build_header(app: gr.Blocks, context: AppContext) -> None:
    with gr.Row(elem_id="header"):
        line = gr.HTML(elem_id="header-state")
        toggle = gr.Button("◐", elem_id="theme-toggle", size="sm")
    shown = gr.State("")

    @guarded("reading the state of the run")
    def refresh(seen: str) -> tuple[Any, Any]:
        context.chat.close_if_idle()
        html = header_html(context)
        return (gr.skip(), gr.skip()) if html == seen else (html, html)

    gr.on([app.load, gr.Timer(HEADER_S).tick], refresh, shown, [line, shown], **_QUIET)
    toggle.click(None, js=TOGGLE_THEME)


def _wire(app: gr.Blocks, tabs: gr.Tabs, setup: SetupTab, train: TrainTab, chat: ChatTab, past: RunsTab) -> None:
    app.load(lambda: train.show(None, {}), None, train.outputs, **_QUIET)
    train.tab.select(train.show, [train.run_id, train.seen], train.outputs, **_QUIET)
    chat.tab.select(lambda shown: chat.show(shown, shown), chat.run_id, chat.outputs, **_QUIET)
    past.tab.select(past.show, [past.chosen, past.page], past.outputs, **_QUIET)

    def open_train(run_id: str | None, page: dict[str, Any]) -> list[Any]:
        return [gr.update(selected="train"), *train.show(run_id, page)]

    def open_resumed(resumed: tuple[str, float] | None, page: dict[str, Any]) -> list[Any]:
        return open_train(resumed[0] if resumed else None, page)

    def open_chosen(ids: list[str] | None, page: dict[str, Any]) -> list[Any]:
        return open_train(next(iter(past.settle(ids)), None), page)

    def open_chat(ids: list[str] | None, shown: str | None) -> list[Any]:
        return [gr.update(selected="chat"), *chat.show(next(iter(past.settle(ids)), None), shown)]

    to_train = [tabs, *train.outputs]
    setup.started.change(open_train, [setup.started, train.seen], to_train, **_QUIET)
    past.resumed.change(open_resumed, [past.resumed, train.seen], to_train, **_QUIET)
    past.open_train.click(open_chosen, [past.chosen, train.seen], to_train, **_QUIET)
    to_chat = [tabs, *chat.outputs]
    chat.end(past.open_chat.click, open_chat, [past.chosen, chat.run_id], to_chat)
