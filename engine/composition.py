"""Results of several runs added to one: a run of its own, to chat with and to export.

SpIEL composes what was learnt from two datasets by adding the sparse deltas (arXiv:2401.16405, section 5.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from engine.data.batches import evaluation_batches, prepare_data
from engine.errors import DeltaError
from engine.evaluate import answer_questions, exact_match, heldout_loss
from engine.events import EventWriter, StateChanged
from engine.export import spec_as_run
from engine.hardware import resolve_device
from engine.models import device_of, load_model, load_tokenizer
from engine.runs import (
    Run,
    RunStatus,
    create_run,
    read_report,
    read_spec,
    require_idle,
    write_json,
    write_status,
)
from engine.sparse.compose import Overlap, add, overlap, scale
from engine.sparse.delta import SparseDelta
from engine.units import format_percent


@dataclass(frozen=True)
class Part:
    """One of the runs that were added, and how the sum does on its held-out rows; None where that was not measured.

    Of the three figures the first is the base's, the second that of the run's own result, the third the sum's.
    """

    run: Run
    scale: float
    loss: tuple[float | None, float | None, float | None] | None = None
    exact_match: tuple[float | None, float | None, float | None] | None = None


@dataclass(frozen=True)
class Composition:
    """What was made: the run that holds the sum, its parts, and how far each two of them overlap."""

    run: Run
    num_active: int
    parts: tuple[Part, ...]
    overlaps: tuple[tuple[str, str, Overlap], ...]


def compose(sources: Sequence[Run], scales: Sequence[float], root: Path, *, evaluate: bool = False) -> Composition:
    """Add the deltas of `sources`, each times its scale, and make a finished run of the sum under `root`.

    Args:
        sources: two or more runs of sparse methods over the same weights of the same base.
        scales: one for each run.
        root: the runs folder.
        evaluate: compute loss and exact match of the sum on the held-out rows of each source.

    Raises:
        DeltaError: there are too few, or they belong to different weights, or a head is trained beside them.
        EngineError: a delta, the model or a dataset cannot be loaded, or the folder cannot be written.
    """
    if len(sources) < 2 or len(scales) != len(sources):
        raise DeltaError(
            f"A composition takes two runs or more and a scale for each, got {len(sources)} and {len(scales)}. "
            "Leave the scales away for 1 each."
        )
    deltas = [scale(SparseDelta.load(run.delta_path), factor) for run, factor in zip(sources, scales, strict=True)]
    if any(delta.info.labels is not None for delta in deltas):
        raise DeltaError("The heads of classifications cannot be added. Compose runs of causal language models.")
    summed = add(deltas)
    pairs = combinations(range(len(sources)), 2)
    overlaps = tuple((sources[i].id, sources[j].id, overlap(deltas[i], deltas[j])[0]) for i, j in pairs)
    parts = tuple(Part(run, factor) for run, factor in zip(sources, scales, strict=True))
    if evaluate:
        parts = _evaluated(parts, summed)
    done = Composition(_new_run(parts, root), summed.num_active, parts, overlaps)
    summed.save(done.run.delta_path)
    (done.run.delta_path / "README.md").write_text(_card(done, summed), encoding="utf-8")
    _finish(done, summed)
    return done


def _new_run(parts: Sequence[Part], root: Path) -> Run:
    datasets = dict.fromkeys(Path(read_spec(part.run).dataset or "unknown").name for part in parts)
    return create_run(
        spec_as_run(parts[0].run).model_copy(update={"dataset": " + ".join(datasets), "output": str(root)})
    )


def _evaluated(parts: Sequence[Part], summed: SparseDelta) -> tuple[Part, ...]:
    spec = spec_as_run(parts[0].run)
    require_idle(resolve_device(spec.device), parts[0].run.path.parent)
    device = device_of(spec.device)
    model, tokenizer = load_model(spec, device), load_tokenizer(spec)
    summed.apply(model)
    measured = []
    for part in parts:
        spec, report = read_spec(part.run), read_report(part.run)
        data = prepare_data(spec, tokenizer)
        loss = heldout_loss(model, evaluation_batches(data.evaluation[: spec.evaluation_rows], spec), device)
        answers = answer_questions(model, tokenizer, data.questions[: spec.exact_match_rows])
        before: list[dict[str, Any]] = [report.get(name) or {} for name in ("evaluation_loss", "exact_match")]
        figures = [(each.get("base"), each.get("tuned")) for each in before]
        measured.append(Part(part.run, part.scale, (*figures[0], loss), (*figures[1], exact_match(answers))))
    return tuple(measured)


def _finish(done: Composition, summed: SparseDelta) -> None:
    none = {"base": None, "tuned": None}
    report = {
        "run": done.run.id,
        "state": "finished",
        "evaluation_loss": none,
        "exact_match": none,
        "train_seconds": 0.0,
        "peak_bytes": 0,
        "planned_peak_bytes": 0,
        "steps": 0,
        "total_steps": 0,
        "num_active": summed.num_active,
        "density": summed.info.density,
        "method": summed.info.method,
        "composed_of": [
            {"run": part.run.id, "scale": part.scale, "loss": part.loss, "exact_match": part.exact_match}
            for part in done.parts
        ],
        "samples": [],
    }
    write_json(done.run.path / "report.json", report)
    writer = EventWriter(done.run.events_path)
    writer.write(StateChanged("finished", f"The sum of {' and '.join(part.run.id for part in done.parts)}."))
    write_status(done.run, RunStatus("finished", seq=writer.seq))


def _card(done: Composition, summed: SparseDelta) -> str:
    lines = "".join(f"- {line}\n" for line in sentences(done))
    share = format_percent(summed.info.density)
    return (
        f"# Sum of {len(done.parts)} sparse deltas over {Path(summed.info.base_model).name}\n\n{lines}\n"
        f"{summed.num_active:,} entries, {share} of the target weights. Method: {summed.info.method}.\n"
    )


def sentences(done: Composition) -> list[str]:
    """Return a line for each part and each two of them, as a person reads it."""
    lines = []
    for part in done.parts:
        text = f"{part.run.id} times {part.scale:g}, trained on {Path(read_spec(part.run).dataset or 'unknown').name}"
        if part.loss is not None:
            text += f"; held-out loss: {_three(part.loss, 4)}"
        if part.exact_match is not None and part.exact_match[2] is not None:
            text += f"; exact match: {_three(part.exact_match, 2)}"
        lines.append(text)
    for first, second, found in done.overlaps:
        text = f"{first} and {second} share {found.shared:,} positions ({format_percent(found.jaccard)} of all theirs)"
        if found.same_sign is not None:
            text += f", {format_percent(found.same_sign)} of them with the same sign"
        if found.cosine is not None:
            text += f", cosine {found.cosine:.2f}"
        lines.append(text)
    return lines


def _three(figures: tuple[float | None, float | None, float | None], digits: int) -> str:
    words = ("not measured" if figure is None else f"{figure:.{digits}f}" for figure in figures)
    return ", ".join(f"{side} {word}" for side, word in zip(("base", "own result", "sum"), words, strict=True))
