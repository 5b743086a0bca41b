"""Step times against a step that trains nothing, and against peers: `python -m benchmarks.speed`.

All methods of a comparison interleaved in one process, medians of the ratios of 20 rounds; they are freed before the
next comparison. What does not fit into a GPU's memory together, or under `--limit-gib`, is measured in blocks as below;
a comparison that lacks a library is left out. On the CPU one thread, fp32, 512 wide, 8 layers, 512 tokens, in CPU
seconds; on a CUDA device four layers of Llama-2-7B's shape, bf16, 2,048 tokens. A step is forward, backward, update and
write-back. Masks: the top 1 percent of |N| exp(s (a_i + b_j) / sqrt 2), normal a and b. LoRA: all linear layers,
dropout 0.

What `recomputation` compares holds all of Llama-7B, twice too much for its limit of 23 GiB: there a subject is made,
warmed up, measured for a block of rounds and freed, then the other; the blocks alternate, and the rounds are paired in
order. On the CPU, the small model and no limit, in the same way.

On a CUDA device also the project's own kernels against their plain forms, on one weight of that shape.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import keep, say_versions
from benchmarks.kernels import compaction_makers, rebuilding_makers, sampling_makers
from benchmarks.subjects import (
    ATTENTION,
    CPU_SIZE,
    CUDA_SIZE,
    KEPT,
    LLAMA_7B,
    Lab,
    Make,
    Size,
    Subject,
    dense_checkpointed,
    makers,
    quantised_makers,
    recomputation_makers,
)
from engine.units import GIB

ROUNDS, BLOCK, WARM_UP = 20, 4, 2
OURS = "compaction, s = 1"
Pairs = Mapping[tuple[str, str], float]
# Ratios to aim for, by device: sparse ones at a share of the dense product of at most 12 percent.
GOALS: dict[str, dict[tuple[str, str], float]] = {
    "cpu": {
        (OURS, "frozen"): 1.15,
        ("compaction, s = 2", "frozen"): 1.15,
        ("columns", "frozen"): 1.08,
        (OURS, "peft SHiRA"): 0.80,
        (OURS, "peft Super-Tuning"): 0.80,
    },
    "cuda": {
        (OURS, "frozen"): 1.10,
        ("compaction, s = 2", "frozen"): 1.10,
        (ATTENTION, "frozen"): 1.10,
        (OURS, "fused LoRA r = 64"): 1.03,
        (OURS, "peft LoRA"): 0.88,
        ("qSpIEL, checkpointed", dense_checkpointed(CUDA_SIZE)): 1.15,
        (KEPT, "fused LoRA r = 64, checkpointed"): 0.75,
        (KEPT, "peft LoRA, checkpointed"): 0.75,
    },
}


@dataclass(frozen=True)
class Comparison:
    """Subjects of one size that are measured against the first of them.

    `limit_gib`: of a CUDA device's memory; `in_blocks`: one subject at a time in memory.
    """

    makers: Callable[[Lab], dict[str, Make]]
    size: Size
    limit_gib: float | None = None
    in_blocks: bool = False


COMPARISONS: dict[str, dict[str, Comparison]] = {
    "cpu": {
        "methods": Comparison(makers, CPU_SIZE),
        "quantised": Comparison(quantised_makers, CPU_SIZE),
        "recomputation": Comparison(recomputation_makers, CPU_SIZE, in_blocks=True),
    },
    "cuda": {
        "methods": Comparison(makers, CUDA_SIZE),
        "quantised": Comparison(quantised_makers, CUDA_SIZE),
        "recomputation": Comparison(recomputation_makers, LLAMA_7B, limit_gib=23.0, in_blocks=True),
        "compaction": Comparison(compaction_makers, CUDA_SIZE),
        "sampling kernel": Comparison(sampling_makers, CUDA_SIZE),
        "rebuilding kernel": Comparison(rebuilding_makers, CUDA_SIZE),
    },
}


@dataclass
class Timed:
    """A subject's steps: seconds, round by round, or why there are none."""

    name: str
    dtype: str = ""
    share: float | None = None
    seconds: tuple[float, ...] = ()
    failure: str = ""


def seconds(subject: Subject, device: str) -> float:
    """Return the time of one step: CPU seconds, or wall-clock seconds of a CUDA device."""
    if device == "cpu":
        begun = time.process_time()
        subject.step()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    subject.step()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(made: list[Subject], device: str, rounds: int) -> list[Timed]:
    """Return every subject's steps after those that warm up; all take turns."""
    found: list[list[float]] = [[] for _ in made]
    for _ in range(rounds + WARM_UP):
        for subject, times in zip(made, found, strict=True):
            times.append(seconds(subject, device))
    return [
        Timed(subject.name, subject.dtype, subject.share, tuple(times[WARM_UP:]))
        for subject, times in zip(made, found, strict=True)
    ]


def measure_in_blocks(made: Mapping[str, Make], device: str, rounds: int) -> list[Timed]:
    """As `measure`, with one subject at a time in memory: blocks of rounds alternate."""
    found = {name: Timed(name) for name in made}
    for _ in range(-(-rounds // BLOCK)):
        for name, make in made.items():
            if not found[name].failure:
                found[name] = _block(make, found[name], device)
            release(device)
    return [*found.values()]


def _block(make: Make, before: Timed, device: str) -> Timed:
    try:
        subject = make()
        (block,) = measure([subject], device, BLOCK)
    except torch.OutOfMemoryError:
        return Timed(before.name, failure="out of memory")
    return Timed(subject.name, subject.dtype, subject.share, before.seconds + block.seconds)


def release(device: str) -> None:
    """Give back what no subject holds any more: hooks tie models into cycles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limited(device: str, limit_gib: float | None) -> Iterator[None]:
    """Let this process have no more than the limit of a CUDA device's memory, context not counted."""
    if device != "cuda" or limit_gib is None:
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def compare(comparison: Comparison, rounds: int, limit_gib: float | None = None) -> list[Timed]:
    """Measure the subjects of a comparison under its limit, or `limit_gib` where that is given, and free them."""
    device = comparison.size.device
    with limited(device, limit_gib or comparison.limit_gib):
        made = comparison.makers(Lab(comparison.size))
        found = None if comparison.in_blocks else _together(made, device, rounds)
        release(device)
        return found or measure_in_blocks(made, device, rounds)


def _together(made: Mapping[str, Make], device: str, rounds: int) -> list[Timed] | None:
    """As `measure`, of all subjects; None where they do not fit into memory at once."""
    try:
        return measure([make() for make in made.values()], device, rounds)
    except torch.OutOfMemoryError:
        return None


def table(timed: list[Timed], device: str) -> list[dict[str, Any]]:
    """Return every ratio to the first, and those of the goals to others."""
    goals, known = GOALS[device], {each.name: each for each in timed}
    pairs = dict.fromkeys([*((each.name, timed[0].name) for each in timed[1:]), *goals])
    return [
        _row(known[name], known[to], device, goals.get((name, to)))
        for name, to in pairs
        if name in known and to in known
    ]


def _row(one: Timed, other: Timed, device: str, goal: float | None) -> dict[str, Any]:
    failure = one.failure or other.failure
    ratios = [] if failure else [mine / its for mine, its in zip(one.seconds, other.seconds, strict=True)]
    return {
        "name": f"{one.name} / {other.name}",
        "device": device,
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "goal": goal,
        "share": None if one.share is None else round(one.share, 4),
        "dtype": f"{one.dtype} / {other.dtype}",
        **({"failure": failure} if failure else {}),
    }


def main() -> None:
    """Print the table, or JSON; `--readings FILE` keeps what there is after each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", action="append", choices=tuple(COMPARISONS["cuda"]), help="default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--limit-gib", type=float, help="of a CUDA device's memory, instead of each comparison's own")
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    if unknown := set(options.comparison or ()) - set(COMPARISONS[options.device]):
        parser.error(f"--comparison {sorted(unknown)[0]} needs a CUDA device. Leave it out.")
    if options.device == "cpu":
        torch.set_num_threads(1)
    say_versions(options.device)
    rows: list[dict[str, Any]] = []
    for name in options.comparison or COMPARISONS[options.device]:
        try:
            timed = compare(COMPARISONS[options.device][name], options.rounds, options.limit_gib)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        rows += table(timed, options.device)
        keep(options.readings, options.device, rows, rounds=options.rounds)
        if not options.json:
            _print(timed, options.device)
    if options.json:
        print(json.dumps(rows))


def _print(timed: list[Timed], device: str) -> None:
    first = timed[0]
    print(f"{first.name}: {first.failure or f'{statistics.median(first.seconds):.4f} s a step'}")
    for row in table(timed, device):
        share = "" if row["share"] is None else f"   {row['share']:.1%} of the dense product"
        goal = "" if row["goal"] is None else f"   (goal {row['goal']:.2f})"
        ratio = row["failure"] if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(f"{row['name']:<64}{ratio}{goal}{share}", flush=True)


if __name__ == "__main__":
    main()
