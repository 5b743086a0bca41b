"""Step times against a step that trains nothing, and against peers: `python -m benchmarks.speed`.

All methods interleaved in one process, medians of the ratios of 20 rounds. On the CPU one thread, fp32, 512 wide, 8
layers, 512 tokens, in CPU seconds; on a CUDA device four layers of Llama-2-7B's shape, bf16, 2,048 tokens. A step is
forward, backward, update and write-back. Masks: the top 1 percent of |N| exp(s (a_i + b_j) / sqrt 2), normal a and b.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.subjects import CPU_SIZE, CUDA_SIZE, Lab, Subject, makers, versions

ROUNDS = 20
OURS = "compaction, s = 1"
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
        (OURS, "fused LoRA r = 64"): 1.03,
        (OURS, "peft LoRA"): 0.88,
    },
}


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


def measure(made: list[Subject], device: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every subject's steps, round by round, after two that warm up."""
    times: dict[str, list[float]] = {subject.name: [] for subject in made}
    for _ in range(rounds + 2):
        for subject in made:
            times[subject.name].append(seconds(subject, device))
    return {name: found[2:] for name, found in times.items()}


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over the rounds of one time over another."""
    return statistics.median(one / other for one, other in zip(times[name], times[to], strict=True))


def table(made: list[Subject], times: dict[str, list[float]], device: str) -> list[dict[str, Any]]:
    """Return every ratio to the frozen step, and those of the goals to others."""
    goals = GOALS[device]
    pairs = [(subject.name, "frozen") for subject in made[1:]] + [pair for pair in goals if pair[1] != "frozen"]
    shares = {subject.name: subject.share for subject in made}
    return [
        {
            "name": f"{name} / {to}",
            "device": device,
            "ratio": round(ratio(times, name, to), 4),
            "goal": goals.get((name, to)),
            "share": None if shares[name] is None else round(shares[name], 4),
        }
        for name, to in pairs
        if name in times and to in times
    ]


def main() -> None:
    """Print the table, or JSON; `--readings FILE` keeps it with the versions it was taken with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    size = CPU_SIZE if options.device == "cpu" else CUDA_SIZE
    if options.device == "cpu":
        torch.set_num_threads(1)
    made = [make() for make in makers(Lab(size)).values()]
    times = measure(made, options.device, options.rounds)
    rows = table(made, times, options.device)
    if options.readings:
        whole = {"versions": versions(size), "rounds": options.rounds, "rows": rows}
        options.readings.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(rows))
        return
    print(f"frozen step: {statistics.median(times['frozen']):.4f} s")
    for row in rows:
        share = "" if row["share"] is None else f"   {row['share']:.1%} of the dense product"
        goal = "" if row["goal"] is None else f"   (goal {row['goal']:.2f})"
        print(f"{row['name']:<44}{row['ratio']:.3f}{goal}{share}")


if __name__ == "__main__":
    main()
