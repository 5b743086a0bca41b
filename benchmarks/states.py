"""What each way to keep AdamW's states costs: time of an update over that of torch's fused AdamW, bytes an entry.

`python -m benchmarks.states [--device cuda] [--tensors 24 --entries 200000] [--json]`: all ways take turns in one
process, on random gradients, on the CPU with one thread; medians. `aged` is what methods with moving entries use.
bitsandbytes' own AdamW8bit has no ages, and nothing to move them by. `written`: with the write-back into a bf16 weight
of which 2 percent are trained, which compact states do in the same step; bytes an entry are then all that stay, the
gradient included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.kept import keep, say_versions
from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import SparseAdamW
from engine.sparse.optimizers import build_optimizer
from engine.sparse.states import StateStore
from engine.spec import RunSpec

ROUNDS = 15
WIDTH, DENSITY = 4096, 0.02  # of the weights that are written
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
WRITTEN = ("float32", "8bit", "compact")  # optimizer_states


class Bench:
    """An optimizer over values of its own, and one update of it."""

    def __init__(
        self, values: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, entries: Sequence[ActiveEntries] = ()
    ) -> None:
        """Make gradients, and do the first update, which makes the states; `entries`: to be written back."""
        self._values, self._optimizer, self._entries = values, optimizer, entries
        for each in values:
            each.grad = 1e-3 * torch.randn(each.numel(), device=each.device)
        self.step_s()

    def step_s(self) -> float:
        """Return the seconds of one update."""
        self._wait()
        begun = time.perf_counter()
        self._optimizer.step()
        for entry in self._entries:
            entry.write_back()
        self._wait()
        return time.perf_counter() - begun

    def entry_bytes(self, device: str) -> float:
        """Return the bytes of states an entry that lie on `device`; code books are shared and not counted.

        Of entries that are written back: of all that stays.
        """
        states = [
            state
            for values in self._values
            for name, state in self._optimizer.state[values].items()
            if isinstance(state, torch.Tensor) and not name.startswith("qmap")
        ]
        for entry in self._entries:
            states += [tensor for _, tensor in entry.resident()]
            states += [] if entry.values.grad is None else [entry.values.grad]
        held = sum(state.nbytes for state in states if state.device.type == device)
        return held / sum(values.numel() for values in self._values)

    def _wait(self) -> None:
        if self._values[0].is_cuda:
            torch.cuda.synchronize()


def _updating(make: Make, device: str, tensors: int, entries: int) -> Bench:
    values = [nn.Parameter(torch.zeros(entries, device=device)) for _ in range(tensors)]
    return Bench(values, make(values))


def _writing(states: str, device: str, tensors: int, entries: int) -> Bench:
    spec = RunSpec(model="random", method="random", optimizer_states=states, dtype="bfloat16")
    rows = round(entries / DENSITY / WIDTH)
    made = []
    for number in range(tensors):
        weight = nn.Parameter(torch.randn(rows, WIDTH, device=device).bfloat16(), requires_grad=False)
        entry = ActiveEntries(str(number), weight, entries, compact=states == "compact")
        entry.place(torch.randperm(weight.numel())[:entries].sort().values.int())
        made.append(entry)
    return Bench([entry.values for entry in made], build_optimizer(made, spec), made)


def measure(device: str, tensors: int, entries: int) -> list[dict[str, str | float]]:
    """Return a row for each way: ratio of its update's time, and bytes of states an entry by where they lie."""
    torch.manual_seed(0)
    benches = {name: _updating(make, device, tensors, entries) for name, make in WAYS.items()}
    benches |= {f"written, {states}": _writing(states, device, tensors, entries) for states in WRITTEN}
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
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    kind = torch.device(options.device).type
    if kind == "cpu":
        torch.set_num_threads(1)
    say_versions(kind)
    rows = measure(options.device, options.tensors, options.entries)
    keep(options.readings, kind, rows, rounds=ROUNDS, tensors=options.tensors, entries=options.entries)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'states':<32}{'time':>8}{'ns/entry':>10}{'B/entry':>10}{'in host memory':>16}")
    for row in rows:
        figures = f"{row['ratio']:>8.2f}{row['ns_per_entry']:>10.2f}{row['device_bytes']:>10.2f}"
        print(f"{row['name']:<32}{figures}{row['host_bytes']:>16.2f}")


if __name__ == "__main__":
    main()
