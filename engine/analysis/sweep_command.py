"""`python -m engine analyse density | modules | schedule`: sets of real runs, compared."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.analysis.options import (
    Options,
    add_spec_kind,
    at_least,
    finish,
    folder_of,
    gpu_held,
    listed,
    rate_of,
    spec_of,
)
from engine.analysis.sweep_findings import density_findings, module_findings, schedule_findings
from engine.analysis.sweeps import (
    MODULES,
    Row,
    density_trials,
    module_trials,
    run_trials,
    schedule_trials,
    specs_of,
)
from engine.errors import EngineError
from engine.planner.plan import make_plan, require_fit
from engine.planner.shape import read_shape
from engine.spec import BASELINES, METHODS, SPIEL_METHODS, choices

SPARSE_METHODS = tuple(name for name in METHODS if name not in BASELINES)
INTERRUPTED = 130


def add_sweeps(kinds: Any) -> None:
    """Add the kinds that train."""
    density = add_spec_kind(kinds, "density", _sweep)
    density.add_argument(
        "--densities", type=listed(float), default=(0.001, 0.005, 0.01, 0.05), help="shares, by commas"
    )
    modules = add_spec_kind(kinds, "modules", _sweep)
    modules.add_argument(
        "--modules", type=listed(str, MODULES), default=MODULES, help=f"by commas, of {', '.join(MODULES)}"
    )
    schedule = add_spec_kind(kinds, "schedule", _sweep)
    schedule.add_argument("--periods", type=listed(int), default=(10, 20, 40, 80), help="steps, by commas")
    schedules = choices("schedule")
    schedule.add_argument(
        "--schedules", type=listed(str, schedules), default=schedules, help=f"by commas, of {', '.join(schedules)}"
    )
    for parser, allowed, methods in (
        (density, (*SPARSE_METHODS, "lora"), ("sift", "random", "lora")),
        (modules, SPARSE_METHODS, ("sift", "random")),
        (schedule, SPIEL_METHODS, ("spiel-ag",)),
    ):
        words = f"by commas, of {', '.join(allowed)} (default: {','.join(methods)})"
        parser.add_argument("--methods", type=listed(str, allowed), default=methods, help=words)
        parser.add_argument("--seeds", type=at_least(1), default=1, help="runs of each (default: 1)")
        rate = "learning rate of one method; may be repeated (default: the spec's; lora 5 and spiel-ma 20 times that)"
        parser.add_argument("--rate", action="append", type=rate_of, default=[], metavar="METHOD=VALUE", help=rate)


def _sweep(options: Options) -> int:
    """Train every run of a sweep, a line each on stderr; what is finished when Ctrl-C comes is reported."""
    spec = spec_of(options)
    shape = read_shape(spec.model, spec.model_revision)
    match options.kind:
        case "density":
            trials, say = density_trials(shape, spec, options.densities, options.methods), density_findings
        case "modules":
            trials, say = module_trials(shape, spec, options.modules, options.methods), module_findings
        case _:
            trials, say = schedule_trials(options.periods, options.schedules, options.methods), schedule_findings
    specs = specs_of(spec, trials, options.seeds, dict(options.rate))
    for each in specs:
        require_fit(make_plan(each[0]))
    folder = folder_of(options, Path(spec.model).name)
    try:
        with gpu_held(spec):  # of the folder of runs; those of the sweep lie in folders of their own
            rows = run_trials(trials, specs, folder / "rows.jsonl", _tell)
    except (EngineError, KeyboardInterrupt):  # before the first run was over
        folder.rmdir()
        raise
    total = sum(len(each) for each in specs)
    asked = {
        "spec": spec.model_dump(mode="json"),
        "settings": {"seeds": options.seeds, "runs": f"{len(rows)} of {total}"},
    }
    status = finish(options, folder, say(rows), {"rows": [asdict(row) for row in rows]}, asked)
    return status if len(rows) == total else INTERRUPTED


def _tell(row: Row, number: int, total: int) -> None:
    words = ", ".join(row.labels.values())
    if row.error:
        figures = f"failed: {row.error}"
    else:
        loss = "unknown" if row.loss is None else f"{row.loss:.4f}"
        match_text = "" if row.exact_match is None else f", exact match {row.exact_match:.2f}"
        figures = f"{row.trained:,} values, held-out loss {loss}{match_text}, {row.train_seconds:.0f} s"
    print(f"{number}/{total}  {words}, seed {row.seed}: {figures}", file=sys.stderr, flush=True)
