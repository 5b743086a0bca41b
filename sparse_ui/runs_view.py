"""What the Runs tab shows: the table of runs, the comparison of some, the details of one."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from engine import runs
from engine.runs import Run
from engine.units import format_duration, format_percent
from sparse_ui import cards, charts
from sparse_ui.fields import word_of
from sparse_ui.history import HistoryReader
from sparse_ui.messages import explain, with_labels
from sparse_ui.train_view import peak_words, run_html, score_words, short_name

LOG_LINES = 40
HEADERS = (
    ("Run", ""),
    ("State", ""),
    ("Model", ""),
    ("Dataset", ""),
    ("Method", ""),
    ("Density", "right"),
    ("Steps", "right"),
    ("Held-out loss", "right"),
    ("Exact match or score", "right"),
    ("Peak memory", "right"),
    ("Time", "right"),
)


def runs_table(reader: HistoryReader, found: Sequence[Run], ids: Sequence[str]) -> str:
    """Return the table, newest run first, those of `ids` marked; a run that cannot be read keeps its row."""
    if not found:
        return cards.title("Runs") + cards.empty("No run yet. Start one on Setup.")
    rows = []
    for run in found:
        try:
            rows.append({"id": run.id, "chosen": run.id in ids, "cells": _cells(reader, run)})
        except Exception as error:
            words = explain(error, f"reading run {run.id}").text
            cells = [escape(run.id), f'<span class="bad" title="{escape(words)}">unreadable</span>']
            rows.append({"id": run.id, "chosen": run.id in ids, "cells": [*cells, *["–"] * (len(HEADERS) - 2)]})
    return cards.title("Runs", "click one to act on it, tick several to compare") + cards.table(HEADERS, rows)


def _cells(reader: HistoryReader, run: Run) -> list[str]:
    status, spec, history = runs.read_status(run), runs.read_spec(run), reader.read(run)
    last, first, now = history.last, history.first_evaluation, history.last_evaluation
    density = spec.density
    if history.model is not None:
        density = history.model.num_active / max(1, history.model.target_numel)
    return [
        escape(run.id),
        cards.state_cell(status.state),
        escape(short_name(spec.model) + ("" if spec.quantization == "none" else ", NF4")),
        escape(short_name(spec.dataset or "–")),
        word_of(spec.method),
        format_percent(density),
        f"{status.step:,} of {status.total_steps:,}" if status.total_steps else "–",
        cards.change(first.loss if first else None, now.loss if now and now.step else None, 3),
        score_words(run, history),
        peak_words(last.peak_bytes if last else None, runs.read_plan(run)),
        format_duration(last.elapsed_s) if last else "–",
    ]


def comparison(reader: HistoryReader, chosen: Sequence[Run]) -> go.Figure:
    """Return the losses of the chosen runs in one figure."""
    series = []
    for run in chosen:
        history = reader.read(run)
        series.append((run.id, history.steps, [history.evaluations[at] for at in sorted(history.evaluations)]))
    return charts.comparison_figure(series)


def details(reader: HistoryReader, run: Run) -> str:
    """Return the figures of a run, why it failed, and the end of its log."""
    status, history = runs.read_status(run), reader.read(run)
    failure = cards.callout([with_labels(status.detail)]) if status.state == "failed" and status.detail else ""
    tail = runs.log_tail(run, LOG_LINES)
    log = cards.log_box("End of the log", tail) if tail.strip() else ""
    return run_html(run, history, run.id) + failure + log
