"""`python -m engine analyse KIND`: the analyses of both papers from the command line. Torch stays in the workers."""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from engine import runs, workers
from engine.analysis.ages import ages_findings, read_births
from engine.analysis.findings import gradient_findings, landscape_findings
from engine.analysis.options import Options, add_kind, add_spec_kind, at_least, finish, folder_of, gpu_held, spec_of
from engine.analysis.results import Findings, LandscapeResult, read_gradients
from engine.analysis.sweep_command import add_sweeps
from engine.errors import BudgetError, EngineError, WorkerError
from engine.planner.formulas import FP32_BYTES
from engine.planner.plan import make_plan
from engine.planner.shape import read_shape, target_tensors
from engine.spec import RunSpec
from engine.units import format_bytes


def add_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `analyse` with its kinds, and the worker's command, to the command line."""
    text = "Look into a model, a run or a set of runs as the papers did; writes analysis.json and analysis.html."
    kinds = commands.add_parser("analyse", help=text, description=text).add_subparsers(required=True, metavar="KIND")
    gradients = add_spec_kind(kinds, "gradients", _gradients)
    gradients.add_argument("--batches", type=at_least(1), default=8, help="micro-batches looked at (default: 8)")
    landscape = add_spec_kind(kinds, "landscape", _landscape)
    landscape.add_argument("--line", type=at_least(2), default=41, help="points of the line (default: 41)")
    landscape.add_argument("--grid", type=at_least(2, 500), default=15, help="points of the plane's side (default: 15)")
    landscape.add_argument("--rows", type=at_least(1), default=16, help="rows the loss is read on (default: 16)")
    ages = add_kind(kinds, "ages", _ages)
    ages.add_argument("run", nargs="+", help="id or folder of a run of SpIEL, or of SIFT that chooses anew")
    ages.add_argument("--runs", default="runs", metavar="FOLDER", help="where the runs lie (default: runs)")
    add_sweeps(kinds)
    worker = commands.add_parser("analysis-worker", help="Used by the program itself: measure what a folder asks.")
    worker.add_argument("folder", type=Path)
    worker.set_defaults(command=_worker)


def _gradients(options: Options) -> int:
    spec = _dense_spec(options)
    shape = read_shape(spec.model, spec.model_revision)
    largest = max(math.prod(tensor) for tensor in target_tensors(shape, spec.targets).values())
    # The twin, as large as the model; the sort of one weight's squares: two fp32 copies and int64 places.
    _require_room(spec, shape.num_parameters * FP32_BYTES + largest * 16)
    settings = {"batches": options.batches}
    return _measured(options, spec, settings, lambda body: gradient_findings(read_gradients(body)))


def _landscape(options: Options) -> int:
    spec = _dense_spec(options)
    # The twin, the model's own weights kept, delta_1 and d, in at most fp32.
    _require_room(spec, 4 * FP32_BYTES * read_shape(spec.model, spec.model_revision).num_parameters)
    settings = {"line": options.line, "grid": options.grid, "rows": options.rows}
    return _measured(options, spec, settings, lambda body: landscape_findings(LandscapeResult(**body)))


def _ages(options: Options) -> int:
    named = [runs.open_run(name, options.runs) for name in options.run]
    found = {run.id: read_births(run) for run in named}
    folder = folder_of(options, named[0].id)
    asked = {"settings": {"runs": ", ".join(str(run.path) for run in named)}}
    result = {name: asdict(births) for name, births in found.items()}
    return finish(options, folder, ages_findings(found), result, asked)


def _dense_spec(options: Options) -> RunSpec:
    spec = spec_of(options)
    if spec.task != "causal":
        raise EngineError(
            f"analyse {options.kind} reads the loss of a text's next tokens, got task={spec.task}. Leave task away, "
            "and give a causal language model and a dataset for one."
        )
    if spec.quantization != "none":
        raise EngineError(
            f"analyse {options.kind} compares dense weights with random ones, got quantization={spec.quantization}. "
            "Set quantization=none."
        )
    return spec


def _require_room(spec: RunSpec, extra_bytes: int) -> None:
    """Do nothing where a step of SIFT and `extra_bytes` beside it fit the budget.

    Raises:
        BudgetError: they do not.
    """
    plan = make_plan(spec.model_copy(update={"method": "sift"}), with_remedies=False)
    need = plan.peak_bytes + extra_bytes
    if need > plan.budget_bytes:
        raise BudgetError(
            f"This analysis needs about {format_bytes(need)} on {plan.device} and the budget is "
            f"{format_bytes(plan.budget_bytes)}. Lower sequence_length or micro_batch_size, choose a smaller model, "
            "or set device=cpu."
        )


def _measured(
    options: Options, spec: RunSpec, settings: Mapping[str, int], say: Callable[[dict[str, Any]], Findings]
) -> int:
    """Let a worker measure, and report what it found."""
    folder = folder_of(options, Path(spec.model).name)
    asked = {"spec": spec.model_dump(mode="json"), "settings": dict(settings)}
    runs.write_json(folder / "request.json", {"kind": options.kind, **asked})
    result: dict[str, Any] = {}
    try:
        with gpu_held(spec):
            for body in workers.measure(folder):
                if "what" in body:
                    print(f"\r{body['what']}: {body['done']}/{body['total']}  ", end="", file=sys.stderr, flush=True)
                result = body.get("result", result)
    except (EngineError, KeyboardInterrupt) as error:
        if not isinstance(error, WorkerError):  # its log says why it died
            shutil.rmtree(folder)
        raise
    print(file=sys.stderr)
    return finish(options, folder, say(result), result, asked)


def _worker(options: Options) -> int:
    status: int = import_module("engine.analysis.worker").main(options.folder)
    return status
