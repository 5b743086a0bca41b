"""Plain data -> fragments of HTML for the cards. Every word that a person or a file supplied is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.events import RunState, Sample
from engine.planner.plan import HOW_TO_MEASURE, Plan, Remedy
from engine.units import GIB, MIB, format_bytes, format_duration

PART_NAMES = {
    "parameters": "Base parameters",
    "values": "Trained values",
    "indices": "Indices",
    "gradients": "Gradients",
    "optimizer_states": "Optimizer states",
    "saved_activations": "Activations",
    "transients": "Transient",
    "workspace": "Workspace",
    "context": "Process or CUDA",
}
FOLDED_MEMORY = "Model, memory and device"  # heading of the fold with the button that measures
_PART_COLOURS = dict(zip(PART_NAMES, ("p1", "p2", "p7", "p3", "p8", "p4", "p5", "p6", "p9"), strict=True))
_VERDICT_CLASS = {"fits": "ok", "tight": "warn", "does not fit": "bad"}
STATE_CLASS: dict[RunState, str] = {
    "queued": "warn",
    "preparing": "live",
    "running": "live",
    "stopping": "warn",
    "finished": "ok",
    "stopped": "",
    "failed": "bad",
}


def title(text: str, soft: str = "") -> str:
    """Return the heading of a card, with a softer explanation behind it."""
    tail = f'<span class="soft">{escape(soft)}</span>' if soft else ""
    return f'<div class="st-title">{escape(text)}{tail}</div>'


def measure(label: str, words: str) -> str:
    """Return the label of a slider with what it stands for in words."""
    return f'<div class="st-measured"><span class="soft">{escape(label)}</span><b>{escape(words)}</b></div>'


def callout(sentences: Sequence[str], kind: str = "") -> str:
    """Return sentences in a box; empty where there are none. `kind` `note` is a milder colour."""
    if not sentences:
        return ""
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    body = f"<ul>{lines}</ul>" if len(sentences) > 1 else escape(sentences[0])
    return f'<div class="st-callout {kind}" role="alert">{body}</div>'


def empty(text: str) -> str:
    """Return a line that stands where there is nothing to show yet."""
    return f'<div class="st-empty">{escape(text)}</div>'


def stack_bar(parts: Sequence[tuple[str, int, str]], total: int, height: int, mark: int | None = None) -> str:
    """Return a stacked bar.

    Args:
        parts: name, bytes and palette name (`p1`) of each part.
        total: bytes that the whole width stands for.
        height: pixels.
        mark: bytes at which a line stands (the budget).
    """
    total = max(1, total)
    pieces = "".join(
        f'<i style="width:{100 * size / total:.2f}%;background:var(--{colour})" title="{escape(name)}: '
        f'{format_bytes(size)}"></i>'
        for name, size, colour in parts
        if size > 0
    )
    line = "" if mark is None else f'<span class="budget" style="left:{min(99.8, 100 * mark / total):.2f}%"></span>'
    bar = f'<div class="st-stackbar" style="height:{height}px">{pieces}</div>'
    return f'<div class="st-barbox">{bar}{line}</div>' if line else bar


def header(state: RunState | None, words: str, device: str, used: Sequence[tuple[str, int, str]], total: int) -> str:
    """Return the line at the top: name, where the run stands, the device and its memory."""
    in_use = sum(size for _, size, _ in used)
    dot = STATE_CLASS[state] if state else ""
    return (
        f'<div class="st-head"><span class="name">Sparse tuning</span><span class="state"><i class="dot {dot}"></i>'
        f'<span>{escape(words)}</span></span><span class="grow"></span><span class="soft">{escape(device)}</span>'
        f'<span class="mini">{stack_bar(used, total, 8)}</span>'
        f'<span class="soft num">{in_use / GIB:.1f} / {total / GIB:.1f} GiB</span></div>'
    )


def plan_card(plan: Plan) -> str:
    """Return verdict, peak, stacked bar against the budget, legend and the sentence on the phase."""
    parts = [(PART_NAMES[key], plan.parts[key], _PART_COLOURS[key]) for key in PART_NAMES]
    legend = "".join(
        f'<div><i style="background:var(--{colour})"></i><span class="soft">{name}</span>'
        f'<span class="num">{format_bytes(size)}</span></div>'
        for name, size, colour in parts
        if size > 0
    )
    scale = max(plan.budget_bytes, plan.upper_bytes)
    return (
        f'<div class="st-verdict"><span class="st-title">Plan</span>'
        f'<span class="st-pill {_VERDICT_CLASS[plan.verdict]}">{plan.verdict}</span>'
        f'<span class="soft">peak {format_bytes(plan.peak_bytes)}, between {format_bytes(plan.lower_bytes)} and '
        f"{format_bytes(plan.upper_bytes)} · budget {format_bytes(plan.budget_bytes)}</span></div>"
        f'{stack_bar(parts, scale, 34, plan.budget_bytes)}<div class="st-legend">{legend}</div>'
        f'<div class="soft">{escape(_peak_words(plan))}</div><div class="soft">{escape(_time_words(plan))}</div>'
    )


def _peak_words(plan: Plan) -> str:
    words = [f"The peak is in the {plan.phase}, on {plan.device}."]
    if plan.host_bytes:
        words.append(f"Choosing the entries needs {format_bytes(plan.host_bytes)} of main memory beside it.")
    if plan.recomputed:
        words.append(f"Made again in the backward: {plan.recomputed}.")
    if plan.exchanged_bytes:
        words.append(
            f"A step has {plan.rows:,} rows; each process exchanges {format_bytes(plan.exchanged_bytes)} in it."
        )
    return " ".join([*words, *([plan.note] if plan.note else [])])


def _time_words(plan: Plan) -> str:
    if plan.step_s is None:
        return plan.rate_note.replace(HOW_TO_MEASURE, f"Measure this computer, under {FOLDED_MEMORY}.")
    step = f"{plan.step_s:.2g} s" if plan.step_s < 10 else format_duration(plan.step_s)
    run = "" if plan.run_s is None else f", all {format_duration(plan.run_s)}"
    if plan.row_lengths is not None:
        return f"A step takes about {step}{run}."
    return f"A step of full rows takes about {step}{run}; shorter rows take less."


def remedy_line(remedy: Remedy) -> str:
    """Return what a remedy does, what it saves, whether the run then fits, and what it costs."""
    outcome = f" <b>{remedy.outcome}</b>;" if remedy.outcome else ","
    return (
        f'<div class="line"><span>{escape(remedy.title[:1].upper() + remedy.title[1:])}</span>'
        f'<span class="soft">−{format_bytes(remedy.saved_bytes)}{outcome} {escape(remedy.cost)}</span></div>'
    )


def change_list(heading: str, soft: str, changes: Sequence[tuple[str, str, str]]) -> str:
    """Return changes of a spec under a heading: label, from and to, and what it costs."""
    lines = "".join(
        f'<div class="st-kv"><span>{escape(label)}: <b>{escape(words)}</b></span>'
        f'<span class="soft">{escape(cost)}</span></div>'
        for label, words, cost in changes
    )
    return f'{title(heading, soft)}<div style="margin-top:8px">{lines}</div>'


def most_that_fits(figures: Sequence[tuple[str, str]]) -> str:
    """Return that a run fits as it is, and the most of each field with the rest as it is."""
    lines = "".join(
        f'<div class="st-kv"><span class="soft">{escape(label)}</span><span>{escape(figure)}</span></div>'
        for label, figure in figures
    )
    heading = title("Fits as it is", "the most of each, the rest as it is")
    return f'{heading}<div style="margin-top:8px">{lines}</div>'


def fits_map(columns: Sequence[int], rows: Sequence[tuple[int, Sequence[Plan]]], here: tuple[int, int]) -> str:
    """Return peaks over sequence length x micro-batch.

    Args:
        columns: sequence lengths, tokens.
        rows: micro-batch and the plan at each sequence length.
        here: sequence length and micro-batch of the spec itself.
    """
    plans = sorted((plan for _, line in rows for plan in line), key=lambda plan: plan.peak_bytes)
    unit, name = (GIB, "GiB") if plans[len(plans) // 2].peak_bytes >= GIB else (MIB, "MiB")
    cells = "<div></div>" + "".join(f'<div class="soft">{length:,}</div>' for length in columns)
    for batch, line in rows:
        cells += f'<div class="soft num">batch {batch}</div>'
        for length, plan in zip(columns, line, strict=True):
            mark = " here" if (length, batch) == here else ""
            figure = plan.peak_bytes / unit
            text = f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}"
            cells += f'<div class="{_VERDICT_CLASS[plan.verdict]}{mark}" title="{plan.verdict}">{text}</div>'
    style = f"grid-template-columns: 64px repeat({len(columns)}, 1fr)"
    heading = title(
        f"What fits in {format_bytes(plans[0].budget_bytes)}", f"sequence length × micro-batch, peak in {name}"
    )
    return f'{heading}<div class="st-fits" style="{style};margin-top:10px">{cells}</div>'


def key_values(heading: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a card's heading and lines of label and figure."""
    lines = "".join(
        f'<div class="st-kv"><span class="soft">{escape(label)}</span><span>{escape(figure)}</span></div>'
        for label, figure in rows
    )
    return f'{title(heading)}<div style="margin-top:10px">{lines}</div>'


def progress(state: RunState, words: str, done: float, aside: str) -> str:
    """Return the state as a pill, what happens in words, and a bar filled to `done` in [0, 1]."""
    return (
        f'<div class="st-line"><span class="st-pill {STATE_CLASS[state]}">{state}</span><span>{escape(words)}</span>'
        f'<span class="grow"></span><span class="soft num">{escape(aside)}</span></div>'
        f'<div class="st-progress" role="progressbar" aria-valuenow="{100 * done:.0f}">'
        f'<i style="width:{100 * done:.2f}%"></i></div>'
    )


def samples(step: int, items: Sequence[Sample], limit: int = 4) -> str:
    """Return the first answers of an evaluation, each with the question and what was expected."""
    blocks = "".join(
        f'<div class="st-sample"><div class="soft">{escape(item.question)}</div>'
        f"<p>{escape(item.answer) or '<span class=faint>(no answer)</span>'}</p>"
        f'<p class="faint">expected: {escape(item.expected)}</p></div>'
        for item in items[:limit]
    )
    heading = title("Sample answers", "untuned base" if step == 0 else f"step {step:,}")
    return f'{heading}<div style="margin-top:8px">{blocks}</div>'


def log_box(heading: str, text: str) -> str:
    """Return the end of a run's log under a heading."""
    body = escape(text) if text.strip() else "The log is empty."
    return f'{title(heading)}<pre class="st-log">{body}</pre>'


def conversation(number: int, turns: Sequence[tuple[str, str]]) -> str:
    """Return one row of a dataset as turns of role and text."""
    lines = "".join(
        f'<div class="st-turn"><span class="faint">{escape(role)}</span><p>{escape(text)}</p></div>'
        for role, text in turns
    )
    return f'<div class="st-row"><span class="soft">Row {number:,}</span>{lines}</div>'


def counts_line(counts: Mapping[str, int]) -> str:
    """Return counts by reason in words: `3 empty answer, 1 too long`; `none` where all are zero."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none"


def table(headers: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table whose rows can be chosen, by a tick several.

    Args:
        headers: label and class (`right` for figures) of each column.
        rows: `id`, `chosen` and `cells`; a cell is HTML that is already escaped.
    """
    head = "".join(f'<th class="{kind}">{escape(label)}</th>' for label, kind in headers)
    body = ""
    for row in rows:
        tick = f'<td><i class="tick" role="checkbox" aria-checked="{str(row["chosen"]).lower()}"></i></td>'
        cells = tick + "".join(
            f'<td class="{kind}">{cell}</td>' for (_, kind), cell in zip(headers, row["cells"], strict=True)
        )
        chosen = ' class="chosen" aria-selected="true"' if row["chosen"] else ""
        body += f'<tr data-run="{escape(row["id"])}" tabindex="0"{chosen}>{cells}</tr>'
    inner = f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="st-scroll"><table class="st-table">{inner}</table></div>'


def state_cell(state: RunState) -> str:
    """Return a run's state with its dot."""
    return f'<span class="state"><i class="dot {STATE_CLASS[state]}"></i>{state}</span>'


def change(before: float | None, after: float | None, digits: int) -> str:
    """Return `1.184 → 0.962`, with a dash for what is not known."""
    if before is None and after is None:
        return "–"
    return " → ".join("–" if figure is None else f"{figure:.{digits}f}" for figure in (before, after))
