"""Data: how the dataset is read, and what its first rows become."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from engine.data.formats import Conversation
from engine.data.labels import LabelledText, Labels
from engine.data.preview import Preview, preview_dataset
from engine.spec import RunSpec, about
from sparse_ui import cards, form
from sparse_ui.context import AppContext
from sparse_ui.messages import explain

FIELDS = tuple(name for name in form.WIDGETS if name in RunSpec.model_fields and about(name).group == "data")

SHOWN_LABELS = 8


@dataclass(frozen=True)
class DataTab:
    """What the layout wires to other tabs."""

    tab: gr.Tab


def build_data_tab(context: AppContext, widgets: dict[str, Any], dataset_facts: gr.HTML) -> DataTab:
    """Build the tab.

    Args:
        context: of the app.
        widgets: of the form, by name; those of the group `data` but the dataset itself are drawn here.
        dataset_facts: the line under the dataset on Setup, filled from here.
    """
    with gr.Tab("Data", id="data") as tab, gr.Row(elem_id="data-grid", elem_classes="st-grid"):
        with gr.Column(elem_classes="st-card"):
            gr.HTML(cards.title("How it is read"))
            for name in FIELDS:
                if name != "dataset":
                    widgets[name].render()
        with gr.Column(elem_classes="st-stack"):
            with gr.Column(elem_classes="st-card"):
                summary = gr.HTML(elem_id="data-summary")
            with gr.Column(elem_classes="st-card"):
                rows = gr.HTML(elem_id="data-rows")
    fields = [widgets[name] for name in form.WIDGETS]

    def look(*values: Any) -> tuple[str, str, str]:
        return view_data(values, str(context.settings.runs_root))

    gr.on(
        [widgets[name].change for name in FIELDS],
        look,
        fields,
        [summary, rows, dataset_facts],
        show_progress="minimal",
        show_progress_on=summary,
        trigger_mode="always_last",
    )
    return DataTab(tab)


def view_data(values: Sequence[Any], output: str) -> tuple[str, str, str]:
    """Return the summary, the first rows, and the short line of facts for the values of the form.

    Args:
        values: in the order of `form.WIDGETS`.
        output: the folder for runs.
    """
    named = dict(zip(form.WIDGETS, values, strict=True))
    if not str(named["dataset"] or "").strip():
        return cards.empty("Name a dataset on Setup."), "", ""
    try:
        # Only what concerns the data: another field's mistake must not hide the rows.
        kept = {name: named[name] for name in FIELDS}
        neutral = form.fill_form(RunSpec(model="demo", dataset=None))
        spec = form.read_form(
            [kept.get(name, value) for name, value in zip(form.WIDGETS, neutral, strict=True)], output
        )
        preview = preview_dataset(spec)
    except Exception as error:
        message = explain(error, "reading the dataset")
        said = cards.title(message.title) + cards.callout(message.sentences)
        return said, "", _facts(" ".join(message.sentences), "bad")
    dropped = sum(preview.dropped.values())
    facts = f"{preview.rows:,} row{'' if preview.rows == 1 else 's'} · {preview.format} · {dropped:,} dropped"
    return _summary(preview), _rows(preview), _facts(facts, "")


def _facts(text: str, kind: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def _summary(preview: Preview) -> str:
    columns = ", ".join(f"{role} from {column!r}" for role, column in preview.columns.items())
    checked = "" if preview.checked_rows >= preview.training_rows else f" (of the first {preview.checked_rows:,})"
    return cards.key_values(
        preview.name,
        [
            ("Format", preview.format),
            ("Columns", columns or "–"),
            *([] if preview.labels is None else [("Labels", _label_words(preview.labels))]),
            ("Rows", f"{preview.rows:,}"),
            ("To train on", f"{preview.training_rows:,} rows"),
            ("Held out", f"{preview.evaluation_rows:,} rows"),
            (f"Dropped{checked}", cards.counts_line(preview.dropped)),
        ],
    )


def _label_words(labels: Labels) -> str:
    if not labels.names:
        return "numbers (regression)"
    more = f" and {len(labels.names) - SHOWN_LABELS} more" if len(labels.names) > SHOWN_LABELS else ""
    return f"{len(labels.names)}: {', '.join(labels.names[:SHOWN_LABELS])}{more}"


def _rows(preview: Preview) -> str:
    blocks = []
    for number, row in enumerate(preview.conversations, start=1):
        blocks.append(cards.conversation(number, _turns(row)))
    return cards.title("First rows", "as the model will see them, before tokens") + "".join(blocks)


def _turns(row: Conversation | LabelledText) -> list[tuple[str, str]]:
    """Return what a row says as (who or what, words)."""
    if isinstance(row, LabelledText):
        second = [] if row.text_pair is None else [("second", row.text_pair)]
        return [("text", row.text), *second, ("label", row.word)]
    return [(message.role, message.content) for message in row.messages] or [("text", row.text)]
