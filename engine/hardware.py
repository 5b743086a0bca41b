"""What this computer has: graphics cards through NVML, memory through psutil. Never torch: it would hold GPU memory."""

import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import psutil
import pynvml

from engine.errors import DeviceError
from engine.units import GIB


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as NVML sees it; `index` as CUDA counts those that it shows."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    temperature_celsius: int | None
    sm: int = 0
    own_bytes: int = 0


@dataclass(frozen=True)
class Device:
    """Where a run happens: `name` is `cpu` or `cuda:N`; bytes are of that device's memory.

    `own_bytes` of a GPU are held by workers of this program: a run waits until they end. `sm`: compute capability, 89
    for 8.9, 0 where it is not known. `context_bytes` and `workspace_bytes` were measured on this device
    (`planner/calibration.py`), or are None. `here`: whether it is in this computer.
    """

    name: str
    label: str
    total_bytes: int
    free_bytes: int
    sm: int = 0
    own_bytes: int = 0
    context_bytes: int | None = None
    workspace_bytes: int | None = None
    here: bool = True

    @property
    def is_cpu(self) -> bool:
        """Whether the run uses the CPU and main memory."""
        return self.name == "cpu"


def list_gpus() -> list[Gpu]:
    """Return the CUDA devices that a run may use, in their order; empty where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_read_gpu(index, handle) for index, handle in enumerate(_visible(handles))]
    finally:
        pynvml.nvmlShutdown()


def _visible(handles: list[Any]) -> list[Any]:
    """Return the cards that CUDA_VISIBLE_DEVICES names, by number or UUID, up to the first that is not there."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return handles
    named = (_named(name.strip(), handles) for name in names.split(","))
    return list(takewhile(lambda handle: handle is not None, named))


def _named(name: str, handles: list[Any]) -> Any:
    if name.isdecimal():
        return handles[int(name)] if int(name) < len(handles) else None
    return next((handle for handle in handles if name and str(pynvml.nvmlDeviceGetUUID(handle)).startswith(name)), None)


def _read_gpu(index: int, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        temperature: int | None = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    except pynvml.NVMLError:
        temperature = None
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index,
        str(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        temperature,
        10 * major + minor,
        _held_by_workers(handle),
    )


def _held_by_workers(handle: Any) -> int:
    """Return what the worker processes of this program hold on a GPU; 0 where the driver does not tell."""
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return 0
    return sum(int(process.usedGpuMemory or 0) for process in processes if _is_worker(process.pid))


_WORKERS = [[f"{kind}worker"] for kind in ("", "chat-", "analysis-", "calibrate-")]  # all hold the lock of their device


def _is_worker(pid: int) -> bool:
    try:
        words = [word for word in psutil.Process(pid).cmdline() if word != "-u"]  # torchrun's
    except psutil.Error:
        return False
    return words[1:3] == ["-m", "engine"] and words[3:4] in _WORKERS


@lru_cache(maxsize=1)
def main_memory_bytes() -> int:
    """Return the size of this computer's main memory."""
    return int(psutil.virtual_memory().total)


def selection_memory_bytes(memory_gib: float | None) -> int:
    """Return how much main memory sums of gradients may take: what a spec says, or half of this computer's."""
    return main_memory_bytes() // 2 if memory_gib is None else int(memory_gib * GIB)


def free_memory_bytes() -> int:
    """Return how much of this computer's main memory a process could take now."""
    return int(psutil.virtual_memory().available)


def resolve_device(name: str) -> Device:
    """Return the device that a spec's `device` means on this computer.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        DeviceError: a GPU is named that is not there.
    """
    gpus = list_gpus()
    if name == "cpu" or (name == "auto" and not gpus):
        memory = psutil.virtual_memory()
        return Device("cpu", "CPU", int(memory.total), int(memory.available))
    index = int(name.partition(":")[2] or 0)
    if index >= len(gpus):
        has = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "no NVIDIA GPU that a driver answers for"
        raise DeviceError(f"device {name!r} is not here: this computer has {has}. Use device=auto or device=cpu.")
    gpu = gpus[index]
    return Device(f"cuda:{index}", gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.sm, gpu.own_bytes)


def budget_bytes_of(budget_gib: float | None, device: Device, processes: int = 1) -> int:
    """Return the budget of a process of a run in bytes: what the spec says, on a GPU never more than is free there.

    Without one: the free memory of a GPU, on the CPU, where what is free changes by the second, main memory shared by
    the processes.
    """
    most = (
        device.total_bytes // processes
        if device.is_cpu
        else min(device.total_bytes, device.free_bytes + device.own_bytes)
    )
    asked = most if budget_gib is None else int(budget_gib * GIB)
    return asked if device.is_cpu else min(asked, most)
