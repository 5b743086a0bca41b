"""Peak memory of a step against a step that trains nothing, peers and a floor: `python -m benchmarks.memory`.

On the CPU every storage that an operation makes is counted while it lives, exactly; which products compaction makes
follows what they cost there, with one thread. On a CUDA device the allocator's peak is read. Sizes and methods are
those of `benchmarks.speed`. The peak is that of a later step and holds all: weights, values, indices, gradients,
optimizer states, saved activations and what comes and goes; beside it stands the ratio without the weights, which every
method has alike. The last row is over what a step must hold (`floor_bytes`), for the leanest sparse tuning of this
project: 8-bit states, loss in chunks; on a CUDA device with all layers of Llama-7B.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kept import keep, say_versions
from benchmarks.speed import release
from benchmarks.subjects import CPU_SIZE, CUDA_SIZE, DENSITY, LLAMA_7B, Lab, Subject, makers
from engine.planner.output_layer import chunk_tokens
from engine.planner.storages import StorageMeter
from engine.units import format_bytes

OURS = "compaction, s = 1"
GOALS = {(OURS, "peft SHiRA"): 0.70, (OURS, "peft Super-Tuning"): 0.70}
WARM_UP = 2  # steps after which every state is there
LEAN = "lean"
LEAN_FIELDS: dict[str, Any] = {"gradient_way": "compaction", "optimizer_states": "8bit", "chunked_loss": True}
FLOOR_GOAL = 1.10
ENTRY_BYTES = 10  # column as uint16, low half of an fp32 master, 8-bit m and v, fp32 gradient: 2 + 2 + 2 + 4


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
    release("cuda")
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


def floor_bytes(lab: Lab) -> int:
    """Return what a step of sparse tuning must hold at once: e bytes an element, T tokens, d wide, f in the MLP.

    The parameters, and 10 bytes for each trained entry. Of each layer, where nothing but single elements may be
    computed again: its input x, what attention needs (q, k, v), its output o, the stream behind it x2, and both halves
    of the gated MLP: (6 d + 2 f) e T. Norms are x and x2 scaled, their product with SiLU is gate and up: computed again
    element by element. The row sums of attention (4 heads T) are left out as small. Of the loss in chunks, the logits
    of a chunk in fp32, whose gradient takes their place. Nothing for gradients of activations: they are made while what
    was saved goes.
    """
    size = lab.size
    wide, element = size.width, size.dtype.itemsize
    linear = size.layers * (4 * wide * wide + 3 * wide * size.ffn)
    saved = size.layers * (6 * wide + 2 * size.ffn) * element * size.tokens
    logits = 4 * size.vocabulary * min(size.tokens, chunk_tokens(size.vocabulary))
    return lab.weights_bytes + int(ENTRY_BYTES * DENSITY * linear) + saved + logits


def floor_row(lab: Lab) -> dict[str, Any]:
    """Return the peak of the leanest sparse tuning over the floor."""
    peak, floor = peak_bytes(lambda: lab.sparse(LEAN, **LEAN_FIELDS), lab.size.device), floor_bytes(lab)
    return _row("measured peak / computed floor", lab, peak, floor, FLOOR_GOAL)


def table(peaks: dict[str, int], lab: Lab) -> list[dict[str, Any]]:
    """Return every peak over the frozen one, and those of the goals over others."""
    pairs = [(name, "frozen") for name in peaks if name != "frozen"] + list(GOALS)
    return [
        _row(f"peak of {name} / {to}", lab, peaks[name], peaks[to], GOALS.get((name, to)))
        for name, to in pairs
        if name in peaks and to in peaks
    ]


def _row(name: str, lab: Lab, peak: int, other: int, goal: float | None) -> dict[str, Any]:
    weights = lab.weights_bytes
    return {
        "name": name,
        "device": lab.size.device,
        "ratio": round(peak / other, 4),
        "goal": goal,
        "peak_bytes": peak,
        "ratio_beside_weights": round((peak - weights) / (other - weights), 4),
    }


def main() -> None:
    """Print the table, or JSON; `--readings FILE` keeps what there is after each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    size = CPU_SIZE if options.device == "cpu" else CUDA_SIZE
    if options.device == "cpu":
        torch.set_num_threads(1)
    say_versions(options.device)
    lab, peaks = Lab(size), dict[str, int]()
    for name, make in makers(lab).items():
        peaks[name] = peak_bytes(make, options.device)
        keep(options.readings, options.device, table(peaks, lab))
    rows = [*table(peaks, lab), floor_row(lab if options.device == "cpu" else Lab(LLAMA_7B))]
    keep(options.readings, options.device, rows)
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
