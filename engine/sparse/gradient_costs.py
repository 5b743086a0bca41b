"""What the parts of a gradient cost on this machine: measured once for a device and dtype, kept in the user's cache.

The figures decide which way is taken to a gradient, so they must be the same when a run is done again or goes on: they
are read back from the file that they were written to, and a checkpoint holds those of its run. Where there is no file
to write, and for weights so small that nothing is to be gained, fixed figures stand in.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from engine.planner.calibration import calibration_path
from engine.planner.formulas import SAMPLED_NUMEL
from engine.sparse.compaction import GradientCosts
from engine.sparse.kernels import sampled_products, samples_by_kernel

# One core of a server CPU, fp32: the proportions are what matters.
DEFAULT_COSTS = GradientCosts(
    multiply_s=13e-12, narrow_s=13e-12, gather_s=0.8e-9, sampled_s=4e-9, call_s=20e-6, sampled_call_s=60e-6
)
# An RTX 4090 in bf16 by its data sheet: 165 TFLOP/s and 1 TB/s; not measured.
GPU_COSTS = GradientCosts(
    multiply_s=13e-15, narrow_s=16e-15, gather_s=5.5e-12, sampled_s=0.5e-12, call_s=4e-6, sampled_call_s=20e-6
)
MEASURED_FROM = 2**18  # entries of the largest weight
ROUNDS = 7
CALLS = 10


def costs_for(device: torch.device, dtype: torch.dtype, largest: int) -> GradientCosts:
    """Return the costs on `device` in `dtype` for weights of up to `largest` entries: cached, measured or fixed."""
    fixed = GPU_COSTS if device.type == "cuda" else DEFAULT_COSTS
    if largest < MEASURED_FROM or device.type not in ("cpu", "cuda"):
        return fixed
    path = _path()
    key = machine_key(device, dtype)
    if (known := _read(path).get(key)) is not None:
        return known
    try:
        _write({**_read(path), key: measure_costs(device, dtype)})
    except OSError:  # not written, the next run would measure others
        return fixed
    return _read(path).get(key, fixed)  # what another process may have written meanwhile holds for both


def forget_costs(device: torch.device) -> None:
    """Let the costs on `device` be measured anew, by the next run."""
    begin = _device_words(device)
    known = _read(_path())
    if any(name.startswith(begin) for name in known):
        _write({name: costs for name, costs in known.items() if not name.startswith(begin)})


def _path() -> Path:
    return calibration_path().with_name("gradient_costs.json")


def _write(known: dict[str, GradientCosts]) -> None:
    path, rows = _path(), {name: asdict(costs) for name, costs in known.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    partial.replace(path)


def machine_key(device: torch.device, dtype: torch.dtype) -> str:
    """Return what the costs depend on, in words: device, dtype, torch, the number of threads or the kernel there is."""
    kernel = ", sampled by a kernel" if samples_by_kernel(device, dtype) else ""
    return f"{_device_words(device)}{str(dtype).removeprefix('torch.')}, torch {torch.__version__}{kernel}"


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, "
    return f"{platform.node()} {platform.machine()} with {torch.get_num_threads()} threads, "


def _read(path: Path) -> dict[str, GradientCosts]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {name: GradientCosts(**costs) for name, costs in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def measure_costs(device: torch.device, dtype: torch.dtype) -> GradientCosts:
    """Time the parts on numbers that no cache holds: a fraction of a second on a CPU core, less on a GPU."""
    tokens, width = (2048, 1024) if device.type == "cpu" else (4096, 8192)
    # Freed at once: the C library keeps memory of this size from now on, as in a run, instead of mapping it each time.
    torch.empty(SAMPLED_NUMEL, device=device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, device=device, generator=generator)
    gathered = torch.arange(0, width, 4, dtype=torch.int32, device=device)
    positions = gathered * width + gathered * 37 % width  # neighbours in the order of the weight, far apart in x
    small = x[:16, :16].clone()
    part = x[: tokens // 4, : width // 2].clone()
    product = torch.empty(width // 2, width // 2, dtype=dtype, device=device)

    def call_s(call: Callable[[], object]) -> float:
        """Of several, one after another, as in a step: a GPU is not waited for."""
        return _seconds(lambda: [call() for _ in range(CALLS)], device) / CALLS

    narrow = part[:, : width // 32].contiguous()
    few = product.view(-1)[: narrow.shape[1] * part.shape[1]].view(narrow.shape[1], -1)
    return GradientCosts(
        multiply_s=_seconds(lambda: torch.mm(part.T, part, out=product), device) / (part.shape[0] * product.numel()),
        narrow_s=_seconds(lambda: torch.mm(narrow.T, part, out=few), device) / (part.shape[0] * few.numel()),
        gather_s=_seconds(lambda: x.index_select(1, gathered), device) / (tokens * gathered.numel()),
        sampled_s=_seconds(lambda: sampled_products(x, x, positions), device) / (tokens * positions.numel()),
        call_s=call_s(lambda: torch.mm(small.T, small, out=product[:16, :16])),
        sampled_call_s=call_s(lambda: sampled_products(small, small, positions[:16] % small.numel())),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 2):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times[2:])  # the first ones warm up; what else the machine does only adds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
