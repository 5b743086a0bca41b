"""The largest entries of a gradient, exactly, by a sampled threshold and by topk: `python -m benchmarks.selection`.

One thread, 4096 x 11008 entries, medians of interleaved rounds; the goal is to be no slower.
"""

import argparse
import json
import statistics
import time

import torch

from engine.sparse.selection import largest_places

DENSITIES = (0.001, 0.01, 0.05)
ROUNDS = 5


def measure(density: float, shape: tuple[int, int]) -> float:
    """Return the ratio of both times, checking that the same scores are found."""
    scores = (torch.randn(shape) ** 3).abs().flatten()
    count = int(density * scores.numel())
    ratios = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        ours = largest_places(scores, count)
        between = time.process_time()
        torchs = scores.topk(count, sorted=False).indices
        ratios.append((between - begun) / (time.process_time() - between))
        assert torch.equal(scores[ours].sort().values, scores[torchs].sort().values), "not the largest"
    return statistics.median(ratios)


def main() -> None:
    """Print a line a density, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [
        {
            "name": f"selection by sampled threshold / topk, {100 * density:g} %",
            "device": "cpu",
            "ratio": measure(density, (options.rows, options.columns)),
            "goal": 1.0,
        }
        for density in DENSITIES
    ]
    print(json.dumps(rows) if options.json else "\n".join(f"{row['name']}: {row['ratio']:.2f}" for row in rows))


if __name__ == "__main__":
    main()
