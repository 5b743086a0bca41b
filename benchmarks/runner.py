"""Runs of a spec for the comparisons: held-out figures from the report, one run at a time or several in a pool."""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

from engine import runs, workers
from engine.analysis.sweeps import train_once
from engine.presets import find_spec_file
from engine.spec_io import apply_overrides, load_values, parse_spec


def run_spec(fields: Mapping[str, Any], overrides: list[str], preset: str = "demo") -> dict[str, Any]:
    """Train `preset` with `fields` and `overrides` put in, in a worker of its own; return its report.

    Raises:
        RunError: the run did not finish.
    """
    values = {**load_values(find_spec_file(preset)), "evaluation_interval": 0, "checkpoint_interval": 0, **fields}
    return train_once(parse_spec(apply_overrides(values, overrides)))


def _create(fields: Mapping[str, Any], overrides: list[str], preset: str, folder: str) -> runs.Run:
    values = {**load_values(find_spec_file(preset)), "evaluation_interval": 0, "checkpoint_interval": 0, **fields}
    return runs.create_run(parse_spec({**apply_overrides(values, overrides), "output": str(Path(folder))}))


def run_specs(
    specs: Sequence[Mapping[str, Any]], overrides: list[str], jobs: int, preset: str = "demo"
) -> list[dict[str, Any]]:
    """Train `preset` with each of `specs` put in, `jobs` at a time with one thread each; return the reports in order.

    A process loads the libraries once and trains many runs. A run that fails has `error` in its report, and no figures.
    Progress goes to stderr.
    """
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        places = {pool.submit(_train_here, dict(spec), overrides, preset): place for place, spec in enumerate(specs)}
        reports: list[dict[str, Any]] = [{}] * len(specs)
        for done, future in enumerate(as_completed(places), 1):
            place = places[future]
            reports[place] = future.result()
            figures = reports[place].get("evaluation_loss", {}).get("tuned", reports[place].get("error"))
            words = " ".join(f"{name}={value}" for name, value in specs[place].items())
            spent = f"{time.monotonic() - begun:5.0f} s"
            print(f"{spent}  {done}/{len(specs)}  {words}: {figures}", file=sys.stderr, flush=True)
    return reports


def _one_thread() -> None:
    import_module("torch").set_num_threads(1)


def _train_here(fields: dict[str, Any], overrides: list[str], preset: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = _create(fields, overrides, preset, folder)
        import_module("engine.train.worker").main(run)
        return workers.finish_report(run)
