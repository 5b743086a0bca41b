"""What the Train tab shows of a run: pieces with a version each, so that a tick sends only what changed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import runs
from engine.errors import EngineError
from engine.metrics import WORDS
from engine.runs import Run, RunStatus
from engine.spec import RunSpec
from engine.units import format_bytes, format_count, format_duration, format_percent
from sparse_ui import cards, charts
from sparse_ui.fields import word_of
from sparse_ui.header import status_words
from sparse_ui.history import History
from sparse_ui.messages import with_labels

NO_RUN = cards.empty("No run yet. Choose a model and a dataset on Setup and start training.")
NO_SAMPLES = cards.title("Sample answers") + cards.empty("None yet.")


@dataclass(frozen=True)
class Piece:
    """One output of the tab. `draw` is called only where `version` differs from what the page has."""

    name: str
    version: Any
    draw: Callable[[], Any]


def pieces_of(run: Run, history: History) -> list[Piece]:
    """Return the pieces of a run as it stands now, in the order of the outputs."""
    status, plan = runs.read_status(run), runs.read_plan(run)
    steps, evaluations = history.steps, [history.evaluations[at] for at in sorted(history.evaluations)]
    probes = [history.probes[at] for at in sorted(history.probes)]
    last_step, last_probe = (history.last.step if history.last else 0), history.last_probe
    answered = history.last_samples
    texts = {
        "progress": progress_html(status, history),
        "run": run_html(run, history, "Figures"),
        "notes": notes_html(run, status, history),
        "samples": cards.samples(answered.step, answered.samples) if answered else NO_SAMPLES,
    }
    planned = planned_memory(plan)
    seen = (run.id, len(steps), last_step)
    probed = (run.id, len(probes), last_probe.step if last_probe else 0)
    figures = {
        "loss": ((*seen, len(evaluations)), lambda: charts.loss_figure(steps, evaluations, run.id)),
        "coverage": (probed, lambda: charts.coverage_figure(probes, steps, run.id)),
        "memory": (seen, lambda: charts.memory_figure(steps, planned, run.id)),
        "gradient": (probed, lambda: charts.gradient_figure(last_probe, run.id)),
    }
    pieces = [_text(name, text) for name, text in texts.items()]
    pieces += [Piece(name, version, draw) for name, (version, draw) in figures.items()]
    # What a button answered stands until the state changes.
    return [*pieces, Piece("said", (run.id, status.state), lambda: "")]


def empty_pieces(notice: str) -> list[Piece]:
    """Return the pieces where there is no run to show; `notice` is HTML that says why."""
    texts = {"progress": notice, "run": cards.title("Figures"), "notes": "", "samples": NO_SAMPLES}
    pieces = [_text(name, text) for name, text in texts.items()]
    pieces += [Piece(name, "none", lambda: None) for name in ("loss", "coverage", "memory", "gradient")]
    return [*pieces, _text("said", "")]


def _text(name: str, text: str) -> Piece:
    return Piece(name, text, lambda: text)


def planned_memory(plan: dict[str, Any]) -> charts.PlannedMemory | None:
    """Return the band of a stored plan; None where no plan was kept."""
    try:
        return charts.PlannedMemory(plan["peak_bytes"], plan["lower_bytes"], plan["upper_bytes"])
    except KeyError:
        return None


def progress_html(status: RunStatus, history: History) -> str:
    """Return the line over the plots: state, step, time left, and a bar."""
    last = history.last
    done = status.step / status.total_steps if status.total_steps else 0.0
    aside = format_duration(last.elapsed_s) + (" so far" if status.is_live else "") if last else ""
    return cards.progress(status.state, status_words(status), min(1.0, done), aside)


def run_html(run: Run, history: History, heading: str) -> str:
    """Return the card of figures: what is trained and how it goes."""
    last, first, now = history.last, history.first_evaluation, history.last_evaluation
    spec, plan = _spec_of(run), runs.read_plan(run)
    rows: list[tuple[str, str]] = []
    if spec is not None:
        dtype = history.model.dtype if history.model else spec.dtype
        rows += [
            ("Model", f"{short_name(spec.model)}, {word_of(dtype) if spec.quantization == 'none' else 'NF4'}"),
            ("Dataset", short_name(spec.dataset or "–")),
            ("Method", method_words(spec, history)),
        ]
    rows += [
        ("Throughput", f"{last.tokens_per_s:,.0f} tokens/s" if last else "–"),
        ("Learning rate", f"{last.learning_rate:.3g}" if last else "–"),
        ("Gradient norm", f"{last.gradient_norm:.3g}" if last else "–"),
        ("Held-out loss", cards.change(first.loss if first else None, now.loss if now and now.step else None, 3)),
        *score_rows(run, history),
        ("Peak memory", peak_words(last.peak_bytes if last else None, plan)),
    ]
    if history.selection is not None and history.selection.gradient_share is not None:
        rows.append(("Dense gradient computed", format_percent(history.selection.gradient_share)))
    if history.checkpoint_step is not None:
        rows.append(("Checkpoint", f"step {history.checkpoint_step:,}"))
    return cards.key_values(heading, rows)


def exact_match_words(run: Run, history: History) -> str:
    """Return exact match of base and tuned model: of the report where there is one, else of the events."""
    report = runs.read_report(run).get("exact_match")
    if report:
        return cards.change(report.get("base"), report.get("tuned"), 2)
    matches = [history.evaluations[at].exact_match for at in sorted(history.evaluations)]
    known = [match for match in matches if match is not None]
    return cards.change(known[0] if known else None, known[-1] if len(known) > 1 else None, 2)


def score_rows(run: Run, history: History) -> list[tuple[str, str]]:
    """Return the lines of what held-out rows say beside the loss: a classification's metrics, else exact match.

    The base of a classification has a head that is not trained, so its figures are those of guesses.
    """
    first, now = history.first_evaluation, history.last_evaluation
    known = first or now
    if known is None or not known.metrics:
        return [("Exact match", exact_match_words(run, history))]
    before = first.metrics if first else {}
    after = now.metrics if now and now.step else {}
    return [(WORDS.get(name, name), cards.change(before.get(name), after.get(name), 3)) for name in known.metrics]


def score_words(run: Run, history: History) -> str:
    """Return the first of these figures for a table, with its name where it is no exact match."""
    name, words = score_rows(run, history)[0]
    return words if name == "Exact match" else f"{words} ({name.lower()})"


def peak_words(peak_bytes: int | None, plan: dict[str, Any]) -> str:
    """Return `19.6 GiB, planned 19.8`, or of these what is known."""
    measured = "–" if peak_bytes is None else format_bytes(peak_bytes)
    if "peak_bytes" not in plan:
        return measured
    if peak_bytes is None:
        return f"planned {format_bytes(plan['peak_bytes'])}"
    planned, unit = format_bytes(plan["peak_bytes"]).split()
    return f"{measured}, planned {planned}" + ("" if measured.endswith(f" {unit}") else f" {unit}")


def method_words(spec: RunSpec, history: History) -> str:
    """Return `SIFT, 1 % (69.5 M values)`."""
    if history.model is None:
        return f"{word_of(spec.method)}, {format_percent(spec.density)}"
    share = history.model.num_active / max(1, history.model.target_numel)
    head = f", head of {format_count(history.model.head_numel)}" if history.model.head_numel else ""
    return f"{word_of(spec.method)}, {format_percent(share)} ({format_count(history.model.num_active)} values{head})"


def notes_html(run: Run, status: RunStatus, history: History) -> str:
    """Return the failure's sentence with the end of the log, and the warnings."""
    notes = cards.callout(history.warnings[-4:], "note")
    if status.state != "failed":
        return notes
    return (
        cards.callout([with_labels(status.detail) or "The run failed."])
        + cards.log_box("End of the log", runs.log_tail(run))
        + notes
    )


def short_name(name: str) -> str:
    """Return the last part of a path, or a name as it is: `notes.jsonl`, `demo/pirate`, `org/model`."""
    return Path(name).name if Path(name).is_absolute() else name


def _spec_of(run: Run) -> RunSpec | None:
    try:
        return runs.read_spec(run)
    except EngineError:
        return None
