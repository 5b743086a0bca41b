"""Peak memory of a step against a step that trains nothing, and against peers: `python -m benchmarks.memory`.

On the CPU every storage that an operation makes is counted while it lives, exactly and without noise; on a CUDA device
the allocator's peak is read. Sizes and methods are those of `benchmarks.speed`. The peak is that of a later step and
holds all: weights, values, indices, gradients, optimizer states, saved activations and what comes and goes; beside it
stands the ratio without the weights, which every method has alike.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import CPU_SIZE, CUDA_SIZE, Lab, Subject, makers, versions
from engine.planner.storages import StorageMeter
from engine.units import format_bytes

OURS = "compaction, s = 1"
GOALS = {(OURS, "peft SHiRA"): 0.70, (OURS, "peft Super-Tuning"): 0.70}
WARM_UP = 2  # steps after which every state is there


class _Meter(StorageMeter):
    """Counts what sparse tensors hold as well: SHiRA builds its change as one."""

    def _note(self, tensor: Tensor, func: Any) -> None:
        parts = (tensor,) if tensor.layout == torch.strided else (tensor._indices(), tensor._values())
        for part in parts:
            super()._note(part, func)


def peak_bytes(make: Callable[[], Subject], device: str) -> int:
    """Return the most bytes that a step of a subject holds at once, the subject itself included."""
    return _allocated_peak(make) if device == "cuda" else _counted_peak(make)


def _allocated_peak(make: Callable[[], Subject]) -> int:
    before = torch.cuda.memory_allocated()
    subject = make()
    for _ in range(WARM_UP):
        subject.step()
    torch.cuda.reset_peak_memory_stats()
    subject.step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def _counted_peak(make: Callable[[], Subject]) -> int:
    meter = _Meter()
    with meter:
        subject = make()
        for _ in range(WARM_UP):
            subject.step()
    ledger = meter.ledger
    begun = len(ledger.events)
    with meter:
        subject.step()
    now = peak = 0
    for place, event in enumerate(ledger.events):
        now += ledger.storages[event].num_bytes if event >= 0 else -ledger.storages[~event].num_bytes
        peak = max(peak, now) if place >= begun else now
    return peak


def table(peaks: dict[str, int], weights: int, device: str) -> list[dict[str, Any]]:
    """Return every peak over the frozen one, and those of the goals over others; also beside `weights` bytes."""
    pairs = [(name, "frozen") for name in peaks if name != "frozen"] + list(GOALS)
    return [
        {
            "name": f"peak of {name} / {to}",
            "device": device,
            "ratio": round(peaks[name] / peaks[to], 4),
            "goal": GOALS.get((name, to)),
            "peak_bytes": peaks[name],
            "ratio_beside_weights": round((peaks[name] - weights) / (peaks[to] - weights), 4),
        }
        for name, to in pairs
        if name in peaks and to in peaks
    ]


def main() -> None:
    """Print the table, or JSON; `--readings FILE` keeps it with the versions it was taken with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    size = CPU_SIZE if options.device == "cpu" else CUDA_SIZE
    lab = Lab(size)
    peaks = {name: peak_bytes(make, options.device) for name, make in makers(lab).items()}
    rows = table(peaks, lab.weights_bytes, options.device)
    if options.readings:
        whole = {"versions": versions(size), "rows": rows}
        options.readings.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(rows))
        return
    print(f"frozen: {format_bytes(peaks['frozen'])}")
    for row in rows:
        goal = "" if row["goal"] is None else f"   (goal {row['goal']:.2f})"
        print(
            f"{row['name']:<48}{row['ratio']:.3f}{goal}   {format_bytes(row['peak_bytes'])}"
            f"   beside the weights {row['ratio_beside_weights']:.3f}"
        )


if __name__ == "__main__":
    main()
