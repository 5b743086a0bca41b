"""An analysis on paper: analysis.json, a page with its plots, and a short table in the terminal."""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.analysis.results import TITLES, Findings, Kind
from engine.errors import EngineError
from engine.runs import write_json
from engine.spec import RunSpec

WIDE = 200  # columns of a table that goes into a file or a pipe
_STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --line: #e3e6eb; --ink: #16191f; --soft: #5d6673; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #101318; --card: #181c23; --line: #2a303a; --ink: #e8ebf0; --soft: #a3acba; }
}
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1080px; background: var(--bg); color: var(--ink);
  font: 14px/1.5 Inter, "Segoe UI", system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 22px; margin: 0 0 8px; } h2 { font-size: 15px; margin: 0; } p { margin: 4px 0 12px; }
.soft { color: var(--soft); font-size: 12px; } .lead { font-size: 16px; margin-bottom: 24px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 20px;
  margin: 16px 0; }
table { border-collapse: collapse; } td, th { padding: 4px 24px 4px 0; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } th { color: var(--soft); font-weight: 550; }
div.scroll { overflow-x: auto; } pre { white-space: pre-wrap; }
"""
_SCRIPT = """
for (const [number, figure] of FIGURES.entries())
  Plotly.newPlot("plot" + number, figure.data, figure.layout, {responsive: true, displaylogo: false});
"""


def new_folder(folder: Path) -> Path:
    """Make a new folder for an analysis, or take an empty one; return it absolute.

    Raises:
        EngineError: it holds files, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise EngineError(
            f"The folder {str(folder)!r} cannot be written: {error.strerror}. Choose another --out."
        ) from None
    if taken:
        raise EngineError(f"--out must be a new or empty folder, got {str(folder)!r}. Choose another one.")
    return folder.absolute()


def write_report(
    folder: Path, kind: Kind, findings: Findings, result: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Write analysis.json and analysis.html into `folder`.

    Args:
        folder: exists.
        kind: of the analysis.
        findings: what it says.
        result: the data behind it.
        asked: the spec and the settings it was made with.

    Returns:
        What analysis.json holds, but for the data and the figures.
    """
    body = {"kind": kind, "title": TITLES[kind], "folder": str(folder), **asdict(findings), **asked}
    write_json(folder / "analysis.json", {**body, "result": dict(result)})
    (folder / "analysis.html").write_text(_page(kind, findings, asked), encoding="utf-8")
    del body["plots"]
    return body


def _page(kind: Kind, findings: Findings, asked: Mapping[str, Any]) -> str:
    # Here alone: the page carries plotly's script, so that it opens anywhere; nothing else of plotly is used.
    from plotly.offline import get_plotlyjs

    title = html.escape(TITLES[kind])
    sections = "".join(
        f"<section><h2>{html.escape(plot.heading)}</h2><p class=soft>{html.escape(plot.caption)}</p>"
        f'<div id="plot{number}"></div></section>'
        for number, plot in enumerate(findings.plots)
    )
    figures = json.dumps([plot.figure for plot in findings.plots], allow_nan=False).replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p class=lead>{html.escape(findings.sentence)}</p>"
        f"<section><div class=scroll>{_html_table(findings)}</div></section>{sections}"
        f"<section><h2>Made with</h2><pre class=soft>{html.escape(_settings(asked))}</pre></section>"
        f"<script>{get_plotlyjs()}</script><script>const FIGURES = {figures};{_SCRIPT}</script></html>"
    )


def _settings(asked: Mapping[str, Any]) -> str:
    """Return what was asked, a line each; fields of a spec that have their defaults are left out."""
    defaults = {name: field.default for name, field in RunSpec.model_fields.items()}
    lines = [f"{name}: {value}" for name, value in asked.get("spec", {}).items() if value != defaults[name]]
    return "\n".join(lines + [f"{name}: {value}" for name, value in asked["settings"].items()])


def _html_table(findings: Findings) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in findings.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in findings.rows)
    return f"<table><tr>{head}</tr>{rows}</table>"


def print_findings(findings: Findings, folder: Path, *, to_stderr: bool) -> None:
    """Print the table, the sentence and where the files lie; on stderr where stdout is for JSON."""
    table = Table(box=None)
    for number, column in enumerate(findings.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in findings.rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, stderr=to_stderr)
    if not console.is_terminal:  # in a pipe nothing needs to fit
        console.width = WIDE
    console.print(table)
    console.print(findings.sentence, soft_wrap=True)
    console.print(f"Plots: {folder / 'analysis.html'}", soft_wrap=True)
