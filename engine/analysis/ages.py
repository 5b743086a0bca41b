"""When the active entries of a run were chosen, from its newest checkpoint (arXiv:2401.16405, Figure 2). Never torch.

SpIEL-AG, and SIFT that chooses anew, know an entry's age from Adam: the updates since it was chosen, with those that
its seeds stand for. SpIEL-MA keeps the number of the reselection that chose it. Where a weight gets no gradient in some
steps (an expert), its entries look as much younger; with 8-bit states ages end at 32,767.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from safetensors import SafetensorError, safe_open

from engine import runs
from engine.analysis.figures import births_figure
from engine.analysis.results import Findings, Plot
from engine.errors import RunError
from engine.runs import Run
from engine.spec import SPIEL_METHODS, RunSpec
from engine.spec_rules import entries_move

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the steps so far, for the table


@dataclass(frozen=True)
class Births:
    """The active entries of a run at `step`, counted by the step after which (or, of SIFT, in which) they were chosen.

    SpIEL's first reselection chooses all anew: entries of the random start that it kept count as its own.
    """

    run: str
    method: str
    step: int
    born: dict[int, int]

    @property
    def num_active(self) -> int:
        """Active entries over all weights."""
        return sum(self.born.values())

    def share(self, low: float, high: float) -> float:
        """Return the share of the entries that were chosen after `low` and up to `high`, in steps."""
        return sum(count for step, count in self.born.items() if low < step <= high) / self.num_active


def read_births(run: Run) -> Births:
    """Return when the entries of `run`'s newest checkpoint were chosen.

    Raises:
        RunError: its entries stay where they are, it has no checkpoint yet, or that cannot be read.
    """
    spec = runs.read_spec(run)
    if spec.method != "spiel-ma" and not entries_move(spec):
        raise RunError(
            f"The entries of run {run.id} stay as {spec.method} chose them, so they are all of one age. "
            "Name a run of spiel-ag or spiel-ma, or of sift with reselection_period."
        )
    checkpoint = runs.latest_checkpoint(run)
    if checkpoint is None:
        raise RunError(
            f"Run {run.id} has no checkpoint yet: it is {runs.read_status(run).state}. It writes one every "
            "checkpoint_interval steps, and at its end."
        )
    suffix = ".born" if spec.method == "spiel-ma" else ".optimizer.age"
    try:
        step = int(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"])
        counted: dict[int, int] = {}
        with safe_open(checkpoint / "values.safetensors", framework="np") as file:
            for name in filter(lambda name: name.endswith(suffix), file.keys()):
                numbers, counts = np.unique(file.get_tensor(name), return_counts=True)
                for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                    birth = birth_step(spec, step, number)
                    counted[birth] = counted.get(birth, 0) + count
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"Checkpoint {str(checkpoint)!r} cannot be read ({type(error).__name__}: {error}).") from error
    if not counted:
        raise RunError(
            f"Checkpoint {str(checkpoint)!r} does not say when entries were chosen: an older version wrote it."
        )
    return Births(run.id, spec.method, step, dict(sorted(counted.items())))


def birth_step(spec: RunSpec, step: int, number: int) -> int:
    """Return the step that chose an entry.

    Args:
        spec: of the run.
        step: updates done.
        number: of spiel-ma the reselection that chose the entry, from 1, or 0 for the random start; else its age.
    """
    if spec.method not in SPIEL_METHODS:
        return step - number + 1
    if step < spec.estimation_steps:
        return 0
    if spec.method == "spiel-ma":
        return spec.estimation_steps + (max(1, number) - 1) * spec.period
    return step + spec.estimation_steps - number  # its seeds stand for the phase


def ages_findings(found: Mapping[str, Births]) -> Findings:
    """Say how many of the active entries are old and how many new, of one run or several.

    Args:
        found: by the name that tells the runs apart.
    """
    first = {name: min(births.born) for name, births in found.items()}
    rows = [("by the first choice", *(_percent(each.share(-1, first[name])) for name, each in found.items()))]
    for low, high in pairwise(PARTS):
        shares = (
            each.share(max(first[name], low * each.step), high * each.step) if high * each.step > first[name] else 0.0
            for name, each in found.items()
        )
        rows.append((f"later, {100 * low:g} to {100 * high:g} % of the steps", *map(_percent, shares)))
    rows.append(("active entries", *(f"{each.num_active:,}" for each in found.values())))
    sentences = [
        f"In {name} ({each.method}, {each.step} steps) {_percent(each.share(-1, first[name]))} of the "
        f"{each.num_active:,} active entries go back to the first choice (step {first[name]}), and "
        f"{_percent(each.share(each.step / 2, each.step))} were chosen in the second half of the steps."
        for name, each in found.items()
    ]
    plot = Plot(
        "Active entries by the step that chose them",
        "As far as each run has come; the first choice takes all entries.",
        births_figure({name: each.born for name, each in found.items()}),
    )
    return Findings(("chosen", *found), tuple(rows), " ".join(sentences), (plot,))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
