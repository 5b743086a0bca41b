"""Measured memory of a run: what the device's allocator holds, or what the process has resident on the CPU."""

from pathlib import Path

import psutil
import torch


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
