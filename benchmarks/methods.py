"""Every method and baseline at the same number of trained parameters: `python -m benchmarks.methods`.

Held-out loss, and exact match where the data has answers, as mean and largest distance from it over three seeds. LoRA's
rank 1 sets the number of trained parameters; IA3 has fewer, and full all, whatever is asked.

The learning rate of each method is searched first, with one seed, over the same grid around a centre that its family
wants; where an end of the grid is best, the grid grows. The search is judged on rows held out of the training part
where the dataset is a folder with a train part, so that the reported rows choose nothing.
"""

import argparse
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.runner import run_specs
from engine.planner.plan import make_plan
from engine.presets import bundled_datasets, find_spec_file
from engine.spec_io import apply_overrides, load_values, parse_spec

SEEDS = 3
SPARSE = ("sift", "random", "magnitude", "fisher", "spiel-ag", "spiel-ma")
# Both also with one budget over all weights instead of the same density in each.
ONE_BUDGET = {"sift, one budget": "sift", "spiel-ag, one budget": "spiel-ag"}
METHODS = (*SPARSE, *ONE_BUDGET, "lora", "ia3", "full")
# Where the search begins. SM3 wants higher rates than Adam (arXiv:2401.16405, appendix D), and so do adapters; full
# wants lower ones.
CENTRES = {"spiel-ma": 0.02, "lora": 0.005, "ia3": 0.01, "full": 0.001}
CENTRE = 0.002
FACTORS = (1 / 3, 1, 3, 9)
GROWTHS = 3  # rates added beyond an end of the grid, at most
SEARCH_SEED = 100  # none of those that are reported
VALIDATION_SHARE = 0.1
SETTINGS = {
    "micro_batch_size": 8,
    "max_steps": 60,
    "warmup_fraction": 0.1,
    "period": 20,
    "estimation_steps": 5,
    "probe_interval": 0,
    "evaluation_rows": 100,
}


def fields_of(method: str, trained: int) -> dict[str, Any]:
    """Return the settings of `method` at `trained` parameters, as far as it lets one choose."""
    fields: dict[str, Any] = {"method": ONE_BUDGET.get(method, method), **SETTINGS}
    if method in ONE_BUDGET:
        fields["allocation"] = "global"
    if fields["method"] in SPARSE:
        fields["num_trainable"] = trained
    if method == "fisher":
        fields["selection_micro_steps"] = 8  # over one micro-batch it would choose as sift does
    if method == "lora":
        fields.update(lora_rank=1, lora_alpha=2)
    return fields


def trained_by_lora(overrides: list[str]) -> int:
    """Return the number of parameters that LoRA of rank 1 trains."""
    values = {**load_values(find_spec_file("demo")), **fields_of("lora", 0)}
    return make_plan(parse_spec(apply_overrides(values, overrides))).num_active


def validation_part(overrides: list[str]) -> dict[str, Any]:
    """Return the settings that hold rows of the training part out, or nothing where it cannot be told apart."""
    name = str(parse_spec(apply_overrides(load_values(find_spec_file("demo")), overrides)).dataset)
    folder = bundled_datasets().get(name, Path(name))
    files = sorted(folder.glob("train.*")) if folder.is_dir() else []
    return {"dataset": str(files[0]), "evaluation_fraction": VALIDATION_SHARE} if files else {}


def search(trained: int, overrides: list[str], jobs: int) -> dict[str, dict[float, float]]:
    """Return the validation loss of each rate that was tried, by method."""
    judged = {**validation_part(overrides), "seed": SEARCH_SEED, "exact_match_rows": 0}
    # What was given for the dataset is in `judged` already.
    others = [item for item in overrides if not (item.startswith("dataset=") and "dataset" in judged)]
    found: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    asked = [(method, _rounded(CENTRES.get(method, CENTRE) * factor)) for method in METHODS for factor in FACTORS]
    for _ in range(1 + GROWTHS):
        specs = [{**fields_of(method, trained), "learning_rate": rate, **judged} for method, rate in asked]
        for (method, rate), report in zip(asked, run_specs(specs, others, jobs), strict=True):
            loss = (report.get("evaluation_loss") or {}).get("tuned")
            found[method][rate] = float("inf") if loss is None else loss
        asked = [(method, rate) for method in METHODS for rate in _beyond(found[method])]
    return found


def _beyond(losses: dict[float, float]) -> list[float]:
    """Return the next rate where the best one is at an end of the grid."""
    best = min(losses, key=lambda rate: losses[rate])
    if best == max(losses):
        return [_rounded(best * 3)] if best * 3 <= 10 else []
    return [_rounded(best / 3)] if best == min(losses) else []


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def measure(trained: int, overrides: list[str], seeds: int, jobs: int) -> list[dict[str, Any]]:
    """Search the rates, then train every method with every seed; return a row a method."""
    tried = search(trained, overrides, jobs)
    best = {method: min(losses, key=lambda rate: losses[rate]) for method, losses in tried.items()}
    specs = [
        {**fields_of(method, trained), "learning_rate": best[method], "seed": seed}
        for method in METHODS
        for seed in range(seeds)
    ]
    reports = run_specs(specs, overrides, jobs)
    return [
        _row(method, best[method], tried[method], reports[place * seeds : (place + 1) * seeds])
        for place, method in enumerate(METHODS)
    ]


def _row(method: str, rate: float, tried: dict[float, float], reports: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "trained": reports[0]["num_active"], "learning_rate": rate}
    row["validation_loss"] = {f"{tried_rate:g}": tried[tried_rate] for tried_rate in sorted(tried)}
    for name in ("evaluation_loss", "exact_match"):
        values = [report[name]["tuned"] for report in reports]
        if None not in values:
            row[name] = statistics.mean(values)
            row[f"{name}_spread"] = max(abs(value - row[name]) for value in values)
            row[f"{name}_base"] = reports[0][name]["base"]
    row["train_seconds"] = statistics.mean(report["train_seconds"] for report in reports)
    return row


def main() -> None:
    """Print a line a method, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of the demo model")
    parser.add_argument("--dataset", help="instead of demo/pirate; a folder with train.* and test.* files")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field of every run")
    options = parser.parse_args()
    named = {"model": options.model, "dataset": options.dataset}
    overrides = [f"{name}={value}" for name, value in named.items() if value] + options.set
    trained = trained_by_lora(overrides)
    rows = measure(trained, overrides, options.seeds, options.jobs)
    if options.json:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        asked = {"model": Path(options.model or "demo").name, "dataset": Path(options.dataset or "demo/pirate").name}
        about = {"python": platform.python_version(), **versions, **asked, "set": options.set, "seeds": options.seeds}
        print(json.dumps({"about": about, "settings": SETTINGS, "rows": rows}, indent=1))
        return
    part = "rows of the training part" if validation_part(overrides) else "the reported rows themselves"
    print(f"{trained:,} trained parameters; learning rates chosen on {part}.", file=sys.stderr)
    for row in rows:
        print(_line(row))


def _line(row: dict[str, Any]) -> str:
    match = f"   exact match {row['exact_match']:.2f} ± {row['exact_match_spread']:.2f}" if "exact_match" in row else ""
    loss = f"{row['evaluation_loss']:.4f} ± {row['evaluation_loss_spread']:.4f}"
    head = f"{row['method']:<22}{row['trained']:>10,} trained   rate {row['learning_rate']:<8g}"
    return f"{head}   held-out loss {loss}{match}"


if __name__ == "__main__":
    main()
