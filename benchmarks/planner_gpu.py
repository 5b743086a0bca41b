"""The plan against real steps on a CUDA device: `python -m benchmarks.planner_gpu`.

Five models of random weights in their real sizes, all methods, with and without checkpointing, short and long rows,
some of them around what a budget of 22.5 GiB holds. Each cell is planned by the closed forms and by the trace, then the
training loop does three steps of it under that limit: most bytes that tensors had (`max_memory_allocated`), most that
the allocator took (`max_memory_reserved`), or that it ran out. Cells follow each other in one process, emptied between
and once more when a model is made.
Half of them, drawn by a seed, are there to calibrate the planner by; the errors that count are those of the other half.
Cells come in an order drawn by a seed too, so that any number of them tells something of all kinds. `--readings FILE`
keeps the rows after each cell, and those that it holds are not done again; `--seconds N` begins no cell after N
seconds. Over NF4 there are none without bitsandbytes.

`--device cpu` does a few small cells by the same code, to show that it works: storages are counted as they are made,
and nothing is reserved.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import keep, kept_rows, say_versions
from benchmarks.random_models import config_folder, random_model
from benchmarks.real_runs import random_rows, train
from engine.hardware import Device
from engine.planner.estimate import estimate
from engine.planner.formulas import workspace_bytes
from engine.planner.ledger import add_up
from engine.planner.shape import read_shape
from engine.planner.storages import StorageMeter
from engine.planner.trace import record, traced_spec
from engine.planner.trace_worker import trace_spec
from engine.spec import RunSpec
from engine.units import GIB

BUDGET_GIB = 22.5
STEPS = 3  # SpIEL chooses in the first, moves in the second, and begins anew in the third
SPLIT_SEED, ORDER_SEED = 0, 1
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", {}),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", {}),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", {}),
    "gemma-3-1b": ("google/gemma-3-1b-it", {}),
    "llama-2-7b, 8 layers": ("meta-llama/Llama-2-7b-hf", {"num_hidden_layers": 8}),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", {}),
}
METHODS: dict[str, dict[str, Any]] = {
    "sift": {"method": "sift"},
    "spiel-ag": {"method": "spiel-ag"},
    "spiel-ma": {"method": "spiel-ma"},
    "lora": {"method": "lora", "lora_rank": 64},
    "full": {"method": "full"},
    "sift nf4": {"method": "sift", "quantization": "nf4"},
}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
# Each model and method has one pair or the other, in turns.
SETTINGS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"sequence_length": 512}, {"sequence_length": 2048, "gradient_accumulation": 2, **CHECKPOINTED}),
    ({"sequence_length": 2048}, {"sequence_length": 4096, "chunked_loss": True, **CHECKPOINTED}),
)
# Tokens a row where the closed forms say of SIFT: fits, by a hair; tight; does not fit, by 4 percent.
EDGES: dict[str, tuple[int, int, int]] = {
    "smollm2-360m": (12096, 12544, 13568),
    "qwen3-0.6b": (5888, 6144, 6656),
    "llama-3.2-1b": (6272, 6528, 7040),
    "gemma-3-1b": (3584, 3712, 4032),
    "llama-2-7b, 8 layers": (10560, 11008, 11904),
}


@dataclass(frozen=True)
class Cell:
    """A run of one model."""

    model: str
    method: str
    fields: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Model, method and settings in words."""
        settings = [name if value is True else f"{name}={value}" for name, value in self.fields.items()]
        return " ".join([self.model, self.method, *settings])

    def spec(self, folder: str) -> RunSpec:
        """Return a short run of it, over the config.json in `folder`."""
        common = {"density": 0.01, "gradient_accumulation": 1, "probe_interval": 0, "dtype": "bfloat16"}
        spec = RunSpec(**{"model": folder, **common, **METHODS[self.method], **self.fields})
        return traced_spec(spec).model_copy(update={"max_steps": STEPS})


def cells() -> tuple[Cell, ...]:
    """Return all cells, in an order that is always the same."""
    made = [
        Cell(model, method, fields)
        for row, model in enumerate([*MODELS][:5])
        for column, method in enumerate(METHODS)
        for fields in SETTINGS[(row + column) % 2]
    ]
    made += [Cell(model, "sift", {"sequence_length": length}) for model, edge in EDGES.items() for length in edge]
    lean = {"sequence_length": 2048, "chunked_loss": True}
    made += [Cell("llama-2-7b", "sift nf4", lean | fields) for fields in (CHECKPOINTED, {})]
    made += [Cell("llama-2-7b", method, lean | CHECKPOINTED) for method in ("sift", "spiel-ag", "spiel-ma", "lora")]
    return tuple(made)


def held_out(count: int) -> frozenset[int]:
    """Return the numbers of the cells that nothing is calibrated by: half of `count`, drawn by a seed."""
    return frozenset(random.Random(SPLIT_SEED).sample(range(count), count // 2))


def in_turns(count: int) -> list[int]:
    """Return the numbers of all cells in the order in which they are done."""
    return random.Random(ORDER_SEED).sample(range(count), count)


def measure(cell: Cell, device: Device) -> dict[str, Any]:
    """Return what the plans of a cell say and what its steps take; bytes, without context."""
    model, changes = MODELS[cell.model]
    with config_folder(model, changes | dict(cell.changes)) as folder:
        spec = cell.spec(folder)
        plan, traced = estimate(spec, read_shape(folder), device), trace_spec(spec, device)
        allocated, reserved = _counted(spec) if device.is_cpu else _taken(spec)
    # The library's workspaces are tensors of the allocator on a GPU; storages that are counted know of none.
    around = 0 if device.is_cpu else workspace_bytes(on_cpu=False, sm=device.sm)
    own = plan.peak_bytes - plan.parts["context"] - (plan.parts["workspace"] if device.is_cpu else 0)
    planned = {"closed form": own, "trace": traced.allocated_bytes + around}
    limits = {"closed form": plan.reserved_bytes, "trace": traced.reserved_bytes + around}
    return {
        "name": cell.name,
        "device": device.name,
        "ratio": planned["closed form"] / allocated if allocated else None,
        "goal": 1.0,
        "verdict": plan.verdict,
        "ran": allocated is not None,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "planned_allocated_bytes": planned,
        "planned_reserved_bytes": limits,
        "minimum_bytes": {"closed form": plan.minimum_bytes, "trace": traced.minimum_bytes + around},
    }


def _counted(spec: RunSpec) -> tuple[int, None]:
    model = random_model(spec, torch.device("cpu"))
    meter = StorageMeter()
    record(model, spec, meter, random_rows(spec, model.config.get_text_config().vocab_size))
    return add_up(meter.ledger, 0, host_apart=False).peak.total, None


def _taken(spec: RunSpec) -> tuple[int | None, int | None]:
    """Return the most bytes allocated and reserved, or None twice where the limit was reached."""
    _empty()
    try:
        model = random_model(spec, torch.device("cuda"))
        _empty()
        train(model, spec)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())
    except torch.OutOfMemoryError:
        return None, None


def _empty() -> None:
    """Give everything back that the cell before took, cuBLAS's workspaces too."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def cuda_device() -> Device:
    """Return the first CUDA device, held to the budget; its context lies outside."""
    properties = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(BUDGET_GIB * GIB / properties.total_memory)
    budget, sm = int(BUDGET_GIB * GIB), 10 * properties.major + properties.minor
    return Device("cuda:0", properties.name, budget, budget, sm, context_bytes=0)


def small_cells() -> tuple[Cell, ...]:
    """Return a few cells for the CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": None}
    fields = {"sequence_length": 64, "dtype": "float32", "gradient_way": "dense"}
    return tuple(
        Cell("llama-3.2-1b", method, fields | more, sizes)
        for method, more in (("sift", {}), ("spiel-ag", CHECKPOINTED), ("lora", {}), ("full", {}), ("sift nf4", {}))
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each way to plan and half of the cells, and those on the verdicts."""
    for half, outside in (("calibration", False), ("held out", True)):
        for figure in ("allocated", "reserved"):
            for way in ("closed form", "trace"):
                errors = [
                    abs(row[f"planned_{figure}_bytes"][way] / row[f"{figure}_bytes"] - 1)
                    for row in rows
                    if row["held_out"] == outside and row[f"{figure}_bytes"]
                ]
                if errors:
                    words = f"median error {statistics.median(errors):6.2%}, worst {max(errors):6.2%}"
                    yield f"{half:<12}{figure:<10}{way:<12}{words} of {len(errors)} cells"
    wrong = sum(row["verdict"] == "fits" and not row["ran"] for row in rows)
    shy = sum(row["verdict"] == "does not fit" and row["ran"] for row in rows)
    verdicts = [row["verdict"] for row in rows]
    yield f"{wrong} of {verdicts.count('fits')} that fit ended out of memory"
    yield f"{shy} of {verdicts.count('does not fit')} that do not fit would have fitted"


def main() -> int:
    """Print a line a cell and the errors, or JSON; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--readings", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after that many")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here to measure; --device cpu does a few small cells.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    on_cpu = options.device == "cpu"
    device = Device("cpu", "CPU", 64 * GIB, 64 * GIB) if on_cpu else cuda_device()
    chosen = small_cells() if on_cpu else cells()
    say_versions(options.device)
    rows, begun = kept_rows(options.readings, options.device), time.monotonic()
    done, outside = {row["name"] for row in rows}, held_out(len(chosen))
    without = () if find_spec("bitsandbytes") else ("sift nf4",)
    for number in in_turns(len(chosen)):
        cell = chosen[number]
        if cell.name in done or cell.method in without or time.monotonic() - begun > options.seconds:
            continue
        rows.append(measure(cell, device) | {"held_out": number in outside})
        keep(options.readings, options.device, rows, budget_gib=BUDGET_GIB)
        if not options.json:
            print(_line(rows[-1]), flush=True)
    print(json.dumps(rows) if options.json else "\n".join(summary(rows)))
    return 0


def _line(row: Mapping[str, Any]) -> str:
    planned = " / ".join(f"{size / GIB:.3f}" for size in row["planned_allocated_bytes"].values())
    measured = f"{row['allocated_bytes'] / GIB:.3f}" if row["ran"] else "out of memory"
    return f"{row['name']:<88}{planned:>17} GiB planned, measured {measured} GiB   {row['verdict']}"


if __name__ == "__main__":
    sys.exit(main())
