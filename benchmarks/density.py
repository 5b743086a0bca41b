"""SIFT against random selection over densities, on the bundled demo: `python -m benchmarks.density`.

Held-out exact match and loss after the demo's steps, each run in a worker of its own, the same seed and data order.
"""

import argparse
import json

from benchmarks.runner import run_spec

DENSITIES = (0.001, 0.005, 0.01, 0.05)
METHODS = ("sift", "random")


def measure(method: str, density: float, overrides: list[str]) -> dict[str, float | str | None]:
    """Train the demo once and return its held-out figures."""
    report = run_spec({"method": method, "density": density, "probe_interval": 0}, overrides)
    return {
        "method": method,
        "density": density,
        "num_active": report["num_active"],
        "exact_match_base": report["exact_match"]["base"],
        "exact_match": report["exact_match"]["tuned"],
        "evaluation_loss_base": report["evaluation_loss"]["base"],
        "evaluation_loss": report["evaluation_loss"]["tuned"],
        "train_seconds": report["train_seconds"],
    }


def main() -> None:
    """Print one line a run, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    rows = []
    for density in DENSITIES:
        for method in METHODS:
            row = measure(method, density, options.set)
            rows.append(row)
            if not options.json:
                print(
                    f"{method:<8}{100 * density:>6g} %  {row['num_active']:>9,} values   exact match "
                    f"{row['exact_match_base']:.2f} -> {row['exact_match']:.2f}   held-out loss "
                    f"{row['evaluation_loss']:.4f}   {row['train_seconds']:.0f} s",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
