"""What structured choices cost in quality: whole columns and rows times columns beside free choice, at equal counts.

`python -m benchmarks.structure`: SIFT on the bundled demo; `--set model=... --set dataset=...` for others.
"""

import argparse
import json
from typing import Any

from benchmarks.runner import run_spec

STRUCTURES = ("free", "columns", "rows_x_columns")


def measure(fields: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Train once and return the held-out figures."""
    report = run_spec({"probe_interval": 0, **fields}, overrides)
    return {
        **fields,
        "num_active": report["num_active"],
        "exact_match": report["exact_match"]["tuned"],
        "evaluation_loss_base": report["evaluation_loss"]["base"],
        "evaluation_loss": report["evaluation_loss"]["tuned"],
    }


def main() -> None:
    """Print one line a run, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = [
        {"method": "sift", "density": density, "structure": structure, "seed": seed}
        for density in options.densities
        for seed in range(options.seeds)
        for structure in STRUCTURES
    ]
    runs += [{"method": "random", "density": density, "structure": "free"} for density in options.densities]
    rows = []
    for fields in runs:
        rows.append(measure(fields, options.set))
        if not options.json:
            print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


def _line(row: dict[str, Any]) -> str:
    match = "" if row["exact_match"] is None else f"   exact match {row['exact_match']:.2f}"
    gain = row["evaluation_loss_base"] - row["evaluation_loss"]
    return (
        f"{row['method']:<7}{row['structure']:<15}{100 * row['density']:>5g} %   held-out loss "
        f"{row['evaluation_loss']:.4f} (gain {gain:.4f}){match}"
    )


if __name__ == "__main__":
    main()
