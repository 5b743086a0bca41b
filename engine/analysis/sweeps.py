"""Sets of real runs, each in a worker of its own: over densities, over which weights are trained, over schedules.

arXiv:2312.11875, Figure 6 and Table 4; arXiv:2401.16405, Table 5.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from engine import runs, workers
from engine.errors import EngineError, RunError
from engine.planner.shape import ModelShape
from engine.spec import RunSpec
from engine.spec_io import parse_spec
from engine.targets import Shape, adapted_weights, adapter_numel, is_attention, is_linear, match_targets

MODULES = ("v", "qv", "qk", "qkv", "attention", "mlp", "linear")
# Times the spec's rate, where a method wants another: first guesses, not searched; SM3 wants higher rates than Adam
# (arXiv:2401.16405, appendix D), LoRA than the methods that change the weights themselves.
RATE_FACTORS = {"spiel-ma": 20.0, "lora": 5.0}
_PARTS = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
_QUIET = {"evaluation_interval": 0, "checkpoint_interval": 0, "probe_interval": 0}


@dataclass(frozen=True)
class Trial:
    """One point of a sweep: what it is called in the table, and the fields in which it differs from the spec."""

    labels: dict[str, str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One run of a trial. The figures are None where the run failed, and `error` says why."""

    labels: dict[str, str]
    seed: int
    learning_rate: float
    trained: int | None = None
    base_loss: float | None = None
    loss: float | None = None
    exact_match: float | None = None
    train_seconds: float | None = None
    error: str = ""


def density_trials(shape: ModelShape, spec: RunSpec, densities: Sequence[float], methods: Sequence[str]) -> list[Trial]:
    """Return each method at each density; of lora the ranks whose trained values come nearest, each once.

    Raises:
        TargetsError: `targets` match no weight.
    """
    numel = sum(math.prod(shape.tensors[name]) for name in match_targets(shape.tensors, spec.targets))
    trials = []
    for method in methods:
        if method == "lora":
            of_rank_1 = _lora_numel(shape.tensors, spec)
            ranks = dict.fromkeys(max(1, round(density * numel / of_rank_1)) for density in densities)
            for rank in ranks:
                labels = {"method": method, "budget": f"rank {rank}"}
                trials.append(Trial(labels, {"method": method, "lora_rank": rank, "lora_alpha": 2 * rank}))
            continue
        for density in densities:
            labels = {"method": method, "budget": f"{100 * density:g} %"}
            trials.append(Trial(labels, {"method": method, "density": density, "num_trainable": None}))
    return trials


def _lora_numel(shapes: Mapping[str, Shape], spec: RunSpec) -> int:
    names = adapted_weights(shapes, spec.targets, "lora")
    return sum(adapter_numel(name, shapes[name], "lora", 1) for name in names)


def module_trials(shape: ModelShape, spec: RunSpec, modules: Sequence[str], methods: Sequence[str]) -> list[Trial]:
    """Return each method on each choice of weights, all with the same number of trained values.

    That is the spec's `num_trainable`, or its density of all linear layers.

    Raises:
        EngineError: the model has no such weights, or one choice has fewer entries than are to be trained.
    """
    linear = _numel(shape, [name for name, tensor in shape.tensors.items() if is_linear(name, tensor)])
    trained = spec.num_trainable or max(1, int(spec.density * linear))
    trials = []
    for module, method in product(modules, methods):
        names = module_weights(shape.tensors, module)
        if _numel(shape, names) < trained:
            raise EngineError(
                f"{module} has {_numel(shape, names):,} entries and {trained:,} are to be trained. Set a lower density "
                f"or num_trainable, or leave {module} out of --modules."
            )
        targets = tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        trials.append(
            Trial(
                {"weights": module, "method": method},
                {"method": method, "targets": targets, "num_trainable": trained},
            )
        )
    return trials


def _numel(shape: ModelShape, names: Sequence[str]) -> int:
    return sum(math.prod(shape.tensors[name]) for name in names)


def module_weights(shapes: Mapping[str, Shape], module: str) -> list[str]:
    """Return the weights of the blocks that a name of `MODULES` means.

    Raises:
        EngineError: there are none; a family that keeps q, k and v in one weight has no v alone.
    """
    linear = [name for name, shape in shapes.items() if is_linear(name, shape)]
    attention = [name for name in linear if is_attention(name, shapes[name])]
    if module in ("linear", "attention"):
        names = linear if module == "linear" else attention
    elif module == "mlp":
        names = [name for name in linear if name not in attention]
    else:
        parts = {part for letter in module for part in _PARTS[letter]}
        names = [name for name in attention if not parts.isdisjoint(name.split("."))]
    if not names:
        raise EngineError(f"This model has no weights that {module} means. Leave it out of --modules.")
    return names


def schedule_trials(periods: Sequence[int], schedules: Sequence[str], methods: Sequence[str]) -> list[Trial]:
    """Return each SpIEL method with each schedule and period."""
    return [
        Trial(
            {"method": method, "schedule": schedule, "period": str(period)},
            {"method": method, "schedule": schedule, "period": period},
        )
        for method, schedule, period in product(methods, schedules, periods)
    ]


def specs_of(spec: RunSpec, trials: Sequence[Trial], seeds: int, rates: Mapping[str, float]) -> list[list[RunSpec]]:
    """Return the spec of each run: of each trial one a seed, from the spec's own seed on.

    Args:
        spec: what all runs share; they are neither probed nor saved on the way.
        trials: what differs.
        seeds: runs of each trial.
        rates: learning rate by method, where it is not the spec's times `RATE_FACTORS`.

    Raises:
        InvalidSpecError: one of them is wrong.
    """
    shared = {**spec.model_dump(), **_QUIET}
    if any(trial.fields["method"] != spec.method for trial in trials):
        shared["optimizer"] = "auto"
    found = []
    for trial in trials:
        method = trial.fields["method"]
        rate = rates.get(method, spec.learning_rate * RATE_FACTORS.get(method, 1.0))
        fields = {**shared, **trial.fields, "learning_rate": rate}
        found.append([parse_spec({**fields, "seed": spec.seed + number}) for number in range(seeds)])
    return found


def run_trials(
    trials: Sequence[Trial], specs: Sequence[Sequence[RunSpec]], file: Path, told: Callable[[Row, int, int], None]
) -> list[Row]:
    """Run every spec of every trial, seed by seed, so that an interruption leaves whole tables.

    Args:
        trials: what the rows are called.
        specs: of each trial, one a seed.
        file: takes each row as a JSON line when its run is over.
        told: called with each row, its number and how many there will be.

    Returns:
        The rows; those so far where Ctrl-C came.

    Raises:
        EngineError: the very first run failed, or has no held-out loss, as the others would.
    """
    total = sum(len(each) for each in specs)
    rows: list[Row] = []
    try:
        for number in range(max(len(each) for each in specs)):
            for trial, each in zip(trials, specs, strict=True):
                row = _run(trial, each[number])
                if not rows and row.loss is None:
                    raise EngineError(
                        row.error
                        or "The runs hold no row out, so none can be compared. Set "
                        "evaluation_fraction above 0, for 5 percent to 0.05."
                    )
                rows.append(row)
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(row)) + "\n")
                told(row, len(rows), total)
    except KeyboardInterrupt:
        if not rows:
            raise
    return rows


def _run(trial: Trial, spec: RunSpec) -> Row:
    row = Row(trial.labels, spec.seed, spec.learning_rate)
    try:
        report = train_once(spec)
    except EngineError as error:  # it failed, or its worker did not come up
        return replace(row, error=str(error))
    return replace(
        row,
        trained=report["num_active"],
        base_loss=report["evaluation_loss"]["base"],
        loss=report["evaluation_loss"]["tuned"],
        exact_match=report["exact_match"]["tuned"],
        train_seconds=report["train_seconds"],
    )


def train_once(spec: RunSpec) -> dict[str, Any]:
    """Train `spec` in a worker of its own and a folder that is gone afterwards; return its report.

    Ctrl-C stops the worker and is passed on.

    Raises:
        RunError: the run did not finish.
        WorkerError: its worker did not come up.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = runs.create_run(spec.model_copy(update={"output": folder}))
        try:
            workers.start_worker(run)
            status = workers.wait_for_end(run)
        except KeyboardInterrupt:
            runs.send_request(run, "stop")
            workers.wait_for_end(run)
            raise
        if status.state != "finished":
            raise RunError(status.detail or f"The run was {status.state}.")
        return runs.read_report(run)
