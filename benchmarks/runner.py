"""Runs of a spec for the comparisons: each in a worker of its own, held-out figures from its report."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import runs, workers
from engine.presets import find_spec_file
from engine.spec_io import apply_overrides, load_values, parse_spec


def run_spec(fields: Mapping[str, Any], overrides: list[str], preset: str = "demo") -> dict[str, Any]:
    """Train `preset` with `fields` and `overrides` put in; return its report.

    Raises:
        RuntimeError: the run did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = {**load_values(find_spec_file(preset)), "evaluation_interval": 0, "checkpoint_interval": 0, **fields}
        run = runs.create_run(parse_spec({**apply_overrides(values, overrides), "output": str(Path(folder))}))
        workers.start_worker(run)
        status = workers.wait_for_end(run)
        if status.state != "finished":
            raise RuntimeError(f"{dict(fields)}: {status.detail}")
        return runs.read_report(run)
