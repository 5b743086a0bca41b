"""Measured memory of a run: what the device's allocator holds, or what the process has resident on the CPU."""

from pathlib import Path

import psutil
import torch

from engine.planner.plan import Plan


class MemoryMeter:
    """Reads current and peak bytes of a run on its device.

    CUDA: bytes in live tensors. CPU: resident bytes of this process, libraries included; Linux keeps the peak.
    """

    def __init__(self, device: torch.device, peak_before_bytes: int = 0) -> None:
        """Begin to measure; `peak_before_bytes` is the peak of earlier sessions of the run."""
        self._device = device
        self._peak = peak_before_bytes
        self._process = psutil.Process()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def current_bytes(self) -> int:
        """Return the bytes in use now."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        return int(self._process.memory_info().rss)

    def peak_bytes(self) -> int:
        """Return the most bytes in use since the run began."""
        if self._device.type == "cuda":
            now = int(torch.cuda.max_memory_allocated(self._device))
        else:
            now = max(_peak_resident_bytes(), self.current_bytes())
        self._peak = max(self._peak, now)
        return self._peak


def _peak_resident_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def hold_to_budget(plan: Plan, device: torch.device) -> None:
    """Let this process have no more of a GPU than the budget of `plan`; on the CPU nothing is held back.

    PyTorch's limit is on what its allocator takes, and the CUDA context lies outside of it.
    """
    if device.type != "cuda":
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    share = (plan.budget_bytes - plan.parts["context"]) / total_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
