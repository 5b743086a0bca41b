"""What each way to keep AdamW's states costs: time of an update over that of torch's fused AdamW, bytes an entry.

`python -m benchmarks.states [--device cuda] [--tensors 24 --entries 200000] [--json]`: all ways take turns in one
process, on random gradients; medians. `aged` is what methods with moving entries use. bitsandbytes' own AdamW8bit has
no ages, and nothing to move them by.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from engine.sparse.optim import SparseAdamW
from engine.sparse.states import StateStore

ROUNDS = 15
Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def _ours(eight_bit: bool, offload: bool, aged: bool) -> Make:
    return lambda values: SparseAdamW(values, 1e-3, store=StateStore(eight_bit, offload), aged=aged)


def _peer(values: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(values, lr=1e-3)
    return optimizer


WAYS: dict[str, Make] = {
    "torch AdamW, fused": lambda values: torch.optim.AdamW(values, lr=1e-3, fused=True),
    "ours": _ours(False, False, False),
    "ours, main memory": _ours(False, True, False),
    "ours, 8 bit": _ours(True, False, False),
    "ours, 8 bit, main memory": _ours(True, True, False),
    "ours, aged": _ours(False, False, True),
    "ours, aged, main memory": _ours(False, True, True),
    "ours, aged, 8 bit": _ours(True, False, True),
    "ours, aged, 8 bit, main memory": _ours(True, True, True),
    "bitsandbytes AdamW8bit": _peer,
}


class Bench:
    """An optimizer over values of its own, and one update of it."""

    def __init__(self, make: Make, device: str, tensors: int, entries: int) -> None:
        """Make values and gradients, and do the first update, which makes the states."""
        self._values = [nn.Parameter(torch.zeros(entries, device=device)) for _ in range(tensors)]
        for values in self._values:
            values.grad = 1e-3 * torch.randn_like(values)
        self._optimizer = make(self._values)
        self.step_s()

    def step_s(self) -> float:
        """Return the seconds of one update."""
        self._wait()
        begun = time.perf_counter()
        self._optimizer.step()
        self._wait()
        return time.perf_counter() - begun

    def entry_bytes(self, device: str) -> float:
        """Return the bytes of states an entry that lie on `device`; code books are shared and not counted."""
        states = (
            state
            for values in self._values
            for name, state in self._optimizer.state[values].items()
            if isinstance(state, torch.Tensor) and not name.startswith("qmap")
        )
        held = sum(state.nbytes for state in states if state.device.type == device)
        return held / sum(values.numel() for values in self._values)

    def _wait(self) -> None:
        if self._values[0].is_cuda:
            torch.cuda.synchronize()


def measure(device: str, tensors: int, entries: int) -> list[dict[str, str | float]]:
    """Return a row for each way: ratio of its update's time, and bytes of states an entry by where they lie."""
    torch.manual_seed(0)
    benches = {name: Bench(make, device, tensors, entries) for name, make in WAYS.items()}
    rounds = [{name: bench.step_s() for name, bench in benches.items()} for _ in range(ROUNDS)]
    first = next(iter(WAYS))
    kind = torch.device(device).type
    return [
        {
            "name": name,
            "device": device,
            "ratio": statistics.median(times[name] / times[first] for times in rounds),
            "ns_per_entry": 1e9 * statistics.median(times[name] for times in rounds) / (tensors * entries),
            "device_bytes": bench.entry_bytes(kind),
            "host_bytes": bench.entry_bytes("cpu") if kind != "cpu" else 0.0,
        }
        for name, bench in benches.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tensors", type=int, default=24)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.device, options.tensors, options.entries)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'states':<32}{'time':>8}{'ns/entry':>10}{'B/entry':>10}{'in host memory':>16}")
    for row in rows:
        figures = f"{row['ratio']:>8.2f}{row['ns_per_entry']:>10.2f}{row['device_bytes']:>10.2f}"
        print(f"{row['name']:<32}{figures}{row['host_bytes']:>16.2f}")


if __name__ == "__main__":
    main()
