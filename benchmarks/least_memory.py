"""The least memory under which training succeeds: `python -m benchmarks.least_memory`.

The protocol of arXiv:2401.16405, Appendix F, in steps of 0.1 GiB: the least limit under which three training steps
succeed, a reselection among them; density 1 %, rows of 1 x 2,048 tokens, AdamW or SM3. On a CUDA device each try is a
process of its own that holds itself to the limit (`set_per_process_memory_fraction`, which leaves the CUDA context out)
and trains a model of random weights. Elsewhere the limit is replayed: the trace of the same run and PyTorch's caching
allocator at that limit, and beside it cuBLAS's workspaces, which the trace does not see. `--readings FILE` keeps what
there is after each cell; each try is told as it ends. Cells of Table 3 have the settings of that paper, as many entries
as LoRA of rank 64 has, and beside them what its own code took, in whole GiB; the loss in chunks, and norm outputs and
activation products made again, are this program's. Of methods without a real try only the replay takes time: give
one `--cell` and one `--method` where time on a device is short.
"""

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import keep, say_versions
from benchmarks.published_spiel import TABLE_3
from benchmarks.random_models import config_folder, random_model
from benchmarks.real_runs import train
from engine.hardware import Device
from engine.planner.formulas import workspace_bytes
from engine.planner.trace_worker import trace_spec
from engine.spec import RunSpec
from engine.units import GIB

STEP_GIB = 0.1
TRY_S = 900  # seconds that a try may take
OUT_OF_MEMORY = 3  # exit status of a try under too low a limit
CARD = Device("cuda:0", "a card of 80 GiB", 80 * GIB, 80 * GIB, 90)
COMMON: dict[str, Any] = {
    "density": 0.01,
    "sequence_length": 2048,
    "micro_batch_size": 1,
    "gradient_accumulation": 1,
    "dtype": "bfloat16",
    "chunked_loss": True,
    "recompute": "elementwise",
    "max_steps": 3,
    "period": 2,
    "estimation_steps": 2,
    "probe_interval": 0,
    "evaluation_interval": 0,
    "checkpoint_interval": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "spiel-ma": {"method": "spiel-ma"},
    "spiel-ag": {"method": "spiel-ag"},
    "spiel-ag, 8 bit": {"method": "spiel-ag", "optimizer_states": "8bit"},
    "spiel-ag, compact": {"method": "spiel-ag", "optimizer_states": "compact"},
    "sift": {"method": "sift"},
    "sift, 8 bit": {"method": "sift", "optimizer_states": "8bit"},
    "sift, compact": {"method": "sift", "optimizer_states": "compact"},
}


@dataclass(frozen=True)
class Cell:
    """A model and how it is trained. `goals_gib`: what it should need by each method that it is tried with."""

    name: str
    model: str
    goals_gib: Mapping[str, float]
    fields: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, folder: str, method: str) -> RunSpec:
        """Return three steps by `method`, over the config.json in `folder`."""
        return RunSpec(**{"model": folder, **COMMON, **self.fields, **METHODS[method]})


NF4: dict[str, Any] = {"quantization": "nf4", "gradient_checkpointing": True}
RANK_64 = {"7b": 0.02469, "13b": 0.01973}  # densities of as many entries as LoRA trains


def table_3() -> Iterator[Cell]:
    """Yield the settings of Table 3 over both bases, without and with checkpointing."""
    for size, density in RANK_64.items():
        for base, prefix in (("none", ""), ("nf4", "q")):
            published = {method: TABLE_3[size, prefix + method] for method in ("spiel-ag", "spiel-ma")}
            for checkpointed in (False, True):
                fields = {"density": density, "quantization": base, "gradient_checkpointing": checkpointed}
                goals = {method: float(gib[checkpointed]) for method, gib in published.items()}
                name = f"{size.upper()} {'NF4' if prefix else 'bf16'} of Table 3{', checkpointed' * checkpointed}"
                yield Cell(name, f"meta-llama/Llama-2-{size}-hf", goals, fields)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("7B NF4", "huggyllama/llama-7b", dict.fromkeys(METHODS, 5.8), NF4),
        Cell("13B NF4", "huggyllama/llama-13b", dict.fromkeys(METHODS, 10.3), NF4),
        Cell("33B NF4", "huggyllama/llama-30b", dict.fromkeys(METHODS, 23.0), NF4),
        Cell("7B bf16, no recomputation", "huggyllama/llama-7b", dict.fromkeys(METHODS, 21.3), {}),
        *table_3(),
    )
}


def replayed(cell: Cell, method: str) -> dict[str, Any]:
    """Return the row of a cell by the trace and the allocator's replay."""
    with config_folder(cell.model, cell.changes) as folder:
        found = trace_spec(cell.spec(folder, method), CARD)
    limit = found.minimum_bytes + workspace_bytes(on_cpu=False, sm=CARD.sm)
    parts = {name: round(size / GIB, 3) for name, size in found.figures.peak.parts.items() if size}
    return _row(cell, method, "replayed", math.ceil(limit / GIB / STEP_GIB)) | {
        "phase": found.figures.peak.phase,
        "parts": parts,
    }


def measured(cell: Cell, method: str, guess: int) -> dict[str, Any]:
    """Return the row of a cell by real tries on the CUDA device, the first of them at `guess` steps of 0.1 GiB."""
    return _row(cell, method, "cuda", search(lambda limit: _succeeds(cell, method, limit * STEP_GIB), guess))


def _row(cell: Cell, method: str, device: str, steps: int) -> dict[str, Any]:
    gib, goal_gib = round(steps * STEP_GIB, 1), cell.goals_gib[method]
    return {
        "name": f"least memory of {cell.name}, {method}",
        "device": device,
        "gib": gib,
        "goal_gib": goal_gib,
        "ratio": round(gib / goal_gib, 4),
        "goal": 1.0,
    }


def search(succeeds: Callable[[int], bool], guess: int) -> int:
    """Return the least whole number at which `succeeds`, from 1, where all above it do as well.

    From `guess` in doubled strides to the other side, then by halves: few tries where the guess is good.
    """
    stride, low, high = 1, 0, None
    at = max(1, guess)
    while high is None or low + 1 < high:
        if succeeds(at):
            high = at
            at = max(low + 1, at - stride) if low == 0 else (low + high) // 2
        else:
            low = at
            at = at + stride if high is None else (low + high) // 2
        stride *= 2
    return high


def _succeeds(cell: Cell, method: str, limit_gib: float) -> bool:
    arguments = ["--cell", cell.name, "--method", method, "--limit-gib", f"{limit_gib:.1f}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.least_memory", *arguments], check=False, timeout=TRY_S
    )
    tried = "enough" if done.returncode == 0 else f"too little, or failed ({done.returncode})"
    print(f"{cell.name}, {method}: {limit_gib:.1f} GiB is {tried}", file=sys.stderr, flush=True)
    if done.returncode not in (0, OUT_OF_MEMORY):
        raise RuntimeError(f"The try of {cell.name}, {method} at {limit_gib:.1f} GiB ended with {done.returncode}.")
    return done.returncode == 0


def attempt(cell: Cell, method: str, limit_gib: float | None, device: torch.device) -> bool:
    """Train three steps under a limit; return whether it was enough. Without a limit on the CPU."""
    if device.type == "cuda" and limit_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total, device)
    with config_folder(cell.model, cell.changes) as folder:
        spec = cell.spec(folder, method)
        try:
            train(random_model(spec, device), spec)
        except torch.OutOfMemoryError:
            return False
    return True


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", action="append", choices=tuple(CELLS), help="default: all")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="default: all")
    parser.add_argument("--limit-gib", type=float, help="one try under this limit; exits with 3 where it is too low")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    cells, asked = [CELLS[name] for name in options.cell or CELLS], options.method or [*METHODS]
    if options.limit_gib is not None:
        enough = attempt(cells[0], asked[0], options.limit_gib, torch.device("cuda"))
        sys.exit(0 if enough else OUT_OF_MEMORY)
    kind, table = "cuda" if torch.cuda.is_available() else "cpu", list[dict[str, Any]]()
    say_versions(kind)
    for cell in cells:
        methods = [method for method in asked if method in cell.goals_gib]
        found = [replayed(cell, method) for method in methods]
        if found and torch.cuda.is_available():
            best = min(range(len(methods)), key=lambda place: float(found[place]["gib"]))
            found.append(measured(cell, methods[best], round(found[best]["gib"] / STEP_GIB)))
        table += found
        keep(options.readings, kind, table)
        if not options.json:
            print("\n".join(map(_line, found)), flush=True)
    if options.json:
        print(json.dumps(table))


def _line(row: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in row.get("parts", {}).items() if gib >= 0.01)
    return f"{row['name']:<60}{row['gib']:>6.1f} GiB {row['device']:<9} (goal {row['goal_gib']:.1f})  {parts}"


if __name__ == "__main__":
    main()
