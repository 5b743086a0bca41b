"""Whether a kernel of this project's own is to be trusted on a device: it is compared with the plain form first."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch

_LOG = logging.getLogger(__name__)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels know; sums are in fp32
Found = TypeVar("Found")


class Trial:
    """Whether a kernel is to be trusted: tried at its first use on a device and in a dtype, given up where it fails."""

    def __init__(
        self, work: str, agrees: Callable[[torch.device, torch.dtype], bool], *, library: str = "triton"
    ) -> None:
        """Try nothing yet.

        Args:
            work: what the kernel does, for the log.
            agrees: whether it gives the numbers of the plain form on a small case.
            library: without which there is no kernel, and nothing to say about it.
        """
        self._work, self._agrees = work, agrees
        self._passed: set[tuple[torch.device, torch.dtype]] = set()
        self._failed = find_spec(library) is None

    def passes(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether the kernel may be used."""
        return self.run(lambda: True, device, dtype) is not None

    def run(self, launch: Callable[[], Found], device: torch.device, dtype: torch.dtype) -> Found | None:
        """Return what `launch` gives; None where the kernel is not to be used, now or any more."""
        if self._failed:
            return None
        try:
            if (device, dtype) not in self._passed:
                if not self._agrees(device, dtype):
                    raise ArithmeticError(f"other numbers in {dtype} on {device}")
                self._passed.add((device, dtype))
            return launch()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, its tools or the driver: there is no end of kinds
            self._failed = True
            why = " ".join(f"{type(error).__name__}: {error}".split("\n")[:2])
            _LOG.warning("%s without its kernel: %s", self._work, why)
            return None
