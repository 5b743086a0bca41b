"""Runs of a spec for the comparisons: each in a worker of its own, held-out figures from its report."""

from collections.abc import Mapping
from typing import Any

from engine.analysis.sweeps import train_once
from engine.presets import find_spec_file
from engine.spec_io import apply_overrides, load_values, parse_spec


def run_spec(fields: Mapping[str, Any], overrides: list[str], preset: str = "demo") -> dict[str, Any]:
    """Train `preset` with `fields` and `overrides` put in; return its report.

    Raises:
        RunError: the run did not finish.
    """
    values = {**load_values(find_spec_file(preset)), "evaluation_interval": 0, "checkpoint_interval": 0, **fields}
    return train_once(parse_spec(apply_overrides(values, overrides)))
