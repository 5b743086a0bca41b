"""A run in the terminal: progress bar, figures as they come, result; the list of runs; a chat."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from engine import runs, workers
from engine.errors import EngineError
from engine.events import (
    DataPrepared,
    Evaluated,
    Event,
    ModelLoaded,
    Preflighted,
    Selected,
    StateChanged,
    Stepped,
    Warned,
)
from engine.runs import Run, RunStatus
from engine.units import format_bytes, format_count, format_duration, format_percent

POLL_S = 0.3
WIDE = 200  # columns of a table that goes into a file or a pipe
History = dict[workers.Side, list[dict[str, str]]]
CLEAR = "/clear"


def follow(run: Run, since: int = 0) -> RunStatus:
    """Show a run until its worker is gone; Ctrl-C asks it to stop and goes on showing.

    Args:
        run: with a worker at work.
        since: position in its events from which to show.

    Returns:
        The status it ended with.

    Raises:
        DatasetError: it had nothing to train on, and is gone.
    """
    console = Console(highlight=False, stderr=True)
    console.print(f"Run {run.id} in {run.path}", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("steps", total=None, text="")
        alive = True
        while alive:
            try:
                alive = runs.has_worker(run)  # asked first: what it wrote before it ended is still read
                records, since = runs.read_events(run, since)
                for record in records:
                    if isinstance(record.event, Stepped):
                        progress.update(
                            task,
                            completed=record.event.step,
                            total=record.event.total_steps,
                            text=_step_text(record.event),
                        )
                    elif line := _line(record.event):
                        console.print(line, soft_wrap=True)
                time.sleep(POLL_S if alive else 0)
            except KeyboardInterrupt:
                runs.send_request(run, "stop")
                console.print("Stopping after this step.")
    runs.reconcile(run.path.parent)
    workers.take_back(run)
    status = runs.read_status(run)
    _print_result(run, status, console)
    return status


def _step_text(step: Stepped) -> str:
    return (
        f"loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tokens/s  {format_bytes(step.memory_bytes)}  "
        f"{format_duration(step.remaining_s)} left"
    )


def _line(event: Event) -> str:
    match event:
        case DataPrepared():
            dropped = ", ".join(f"{count} {reason}" for reason, count in event.dropped.items() if count)
            return (
                f"Data: {event.training_rows:,} rows to train on ({event.format}, {event.template} template), "
                f"{event.evaluation_rows:,} held out" + (f"; not as they were: {dropped}" if dropped else "")
            )
        case ModelLoaded():
            head = f" and a head of {format_count(event.head_numel)}" if event.head_numel else ""
            return (
                f"Model: {format_count(event.num_parameters)} parameters in {event.dtype} on {event.device}; trained: "
                f"{format_count(event.num_active)} entries of {event.tensors} weights{head}"
            )
        case Preflighted():
            size, peak = f"{event.rows} x {event.length:,} tokens", format_bytes(event.peak_bytes)
            return f"Tried: one step of {size}, the longest batch; peak {peak}"
        case Selected():
            share = f"{format_percent(event.density)} of the targets"
            replaced = f", {format_percent(event.replaced / event.num_active)} of them new" if event.step > 1 else ""
            work = event.gradient_share
            cost = "" if work is None else f"; {format_percent(work)} of the dense gradient is computed"
            return f"Chosen by {event.method} in step {event.step}: {share}{replaced}{cost}"
        case Evaluated():
            match_text = "" if event.exact_match is None else f", exact match {event.exact_match:.2f}"
            match_text += "".join(f", {name} {figure:.3f}" for name, figure in event.metrics.items())
            return (
                "" if math.isnan(event.loss) else f"Held-out loss after step {event.step}: {event.loss:.4f}{match_text}"
            )
        case Warned():
            return f"Note: {event.message}"
        case StateChanged() if event.detail and event.state != "failed":
            return event.detail
    return ""


def _print_result(run: Run, status: RunStatus, console: Console) -> None:
    if status.state == "failed":
        console.print(f"Error: {status.detail}", soft_wrap=True)
        return
    report = runs.read_report(run)
    if not report:
        console.print(f"The run was {status.state}.")
        return
    steps = f"{report['steps']} step{'' if report['steps'] == 1 else 's'}"
    parts = [f"{status.state.capitalize()} after {steps}, {format_duration(report['train_seconds'])}"]
    for name, words, digits in (("evaluation_loss", "held-out loss", 4), ("exact_match", "exact match", 2)):
        if figures := _arrow(report[name], digits):
            parts.append(f"{words} {figures}")
    metrics = report.get("metrics") or {"base": {}, "tuned": {}}
    for name in metrics["base"] or metrics["tuned"]:
        pair = {side: metrics[side].get(name) for side in ("base", "tuned")}
        parts.append(f"{name} {_arrow(pair, 3)}")
    peak, planned = format_bytes(report["peak_bytes"]), format_bytes(report["planned_peak_bytes"])
    parts.append(f"peak {peak} (planned {planned})")
    console.print("; ".join(parts) + ".", soft_wrap=True)


def print_runs(found: list[Run]) -> None:
    """Print the runs as a table."""
    table = Table(box=None)
    table.add_column("run", no_wrap=True, min_width=max((len(run.id) for run in found), default=0))
    for heading in ("state", "steps", "held-out loss", "exact match or score", "peak"):
        table.add_column(heading)
    for run in found:
        status, report = runs.read_status(run), runs.read_report(run)
        cells = (
            f"{status.step}/{status.total_steps}" if status.total_steps else "",
            _arrow(report.get("evaluation_loss"), 4),
            _arrow(report.get("exact_match"), 2) or _score(report.get("metrics")),
            format_bytes(report["peak_bytes"]) if report else "",
        )
        table.add_row(run.id, status.state, *(cell or "–" for cell in cells))
    console = Console(highlight=False)
    if not console.is_terminal:  # in a pipe nothing needs to fit
        console.width = WIDE
    console.print(table if found else "No runs yet.")


def _arrow(pair: dict[str, float | None] | None, digits: int) -> str:
    if not pair or pair["base"] is None:
        return ""
    tuned = "" if pair["tuned"] is None else f" -> {pair['tuned']:.{digits}f}"
    return f"{pair['base']:.{digits}f}{tuned}"


def _score(metrics: dict[str, dict[str, float]] | None) -> str:
    """Return the first metric of a classification."""
    name = next(iter(metrics["tuned"] if metrics else {}), None)
    return f"{name} {metrics['tuned'][name]:.3f}" if metrics and name else ""


def chat_in_terminal(run: Run) -> int:
    """Ask at the prompt and print both answers as they come, until end of input; return the exit status.

    A question that cannot be answered is said so and taken back; the status is 2 where the last one was.
    """
    console = Console(highlight=False)
    console.print(f"Chat with {run.id}. {CLEAR} begins anew; an empty line or Ctrl-D ends it.", soft_wrap=True)
    chat, history, status = workers.start_chat(run), History({"base": [], "tuned": []}), 0
    try:
        while question := console.input("[bold]you>[/bold] ").strip():
            if question == CLEAR:
                history = History({side: [] for side in history})
                continue
            asked = {side: [*messages, {"role": "user", "content": question}] for side, messages in history.items()}
            answers = _answers(chat, asked, console)
            status = 0 if answers else 2
            for side, answer in answers.items():
                history[side] = [*asked[side], {"role": "assistant", "content": answer}]
    except EOFError:
        console.print()
    finally:
        chat.close()
    return status


def _answers(chat: workers.ChatProcess, asked: History, console: Console) -> dict[workers.Side, str]:
    """Print the answers of both sides and return them; nothing where the question could not be answered."""
    answers: dict[workers.Side, str] = {}
    try:
        for chunk in chat.stream(asked):
            if chunk.side not in answers:
                console.print(f"[dim]{chunk.side:>5}>[/dim] ", end="")
            console.print(
                chunk.text[len(answers.get(chunk.side, "")) :],
                end="\n" if chunk.done else "",
                markup=False,
                soft_wrap=True,
            )
            answers[chunk.side] = chunk.text
    except EngineError as error:
        if not chat.alive:
            raise
        console.print(f"{chr(10) if answers else ''}Error: {error}", markup=False, soft_wrap=True)
        return {}
    return answers
