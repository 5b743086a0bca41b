"""One budget over all weights, and entries chosen anew, beside both papers' way: `python -m benchmarks.allocation`.

The bundled demo at a density where the budget is short; as many entries are trained at once everywhere, mean and
largest distance from it over the seeds. Where entries are chosen anew the result holds more of them: those that left
keep their change.
"""

import argparse
import json
import statistics
from typing import Any

from benchmarks.runner import run_specs

SETTINGS: dict[str, Any] = {"density": 0.002, "max_steps": 150, "probe_interval": 0, "evaluation_rows": 200}
ANEW = {"reselection_period": 50}
ONE_BUDGET = {"allocation": "global"}
ROWS: dict[str, dict[str, Any]] = {
    "sift": {},
    "sift, one budget": ONE_BUDGET,
    "sift, chosen anew": ANEW,
    "sift, both": {**ONE_BUDGET, **ANEW},
    "random": {"method": "random"},
    "spiel-ag": {"method": "spiel-ag"},
    "spiel-ag, one budget": {"method": "spiel-ag", **ONE_BUDGET},
}


def main() -> None:
    """Print a line a way, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field of every run")
    options = parser.parse_args()
    specs = [{**SETTINGS, **fields, "seed": seed} for fields in ROWS.values() for seed in range(options.seeds)]
    reports = run_specs(specs, ["exact_match_rows=96", *options.set], options.jobs)
    rows = []
    for place, name in enumerate(ROWS):
        mine = reports[place * options.seeds : (place + 1) * options.seeds]
        row: dict[str, Any] = {"name": name, "trained": mine[0]["num_active"], "seeds": options.seeds}
        for figure in ("exact_match", "evaluation_loss"):
            values = [report[figure]["tuned"] for report in mine]
            row[figure] = statistics.mean(values)
            row[f"{figure}_spread"] = max(abs(value - row[figure]) for value in values)
        rows.append(row)
        if not options.json:
            print(
                f"{name:<22}{row['trained']:>8,} trained   held-out loss {row['evaluation_loss']:.4f} ± "
                f"{row['evaluation_loss_spread']:.4f}   exact match {row['exact_match']:.2f} ± "
                f"{row['exact_match_spread']:.2f}"
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
