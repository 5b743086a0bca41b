"""From main memory to the device without waiting: the device goes on with what it was given before.

A copy from pinned memory is queued behind the work of the device. A question about numbers that lie there is not: it
waits for all that was queued before. Models of transformers ask one in every forward, whether a mask is whole; main
memory knew, so the mask takes the answer along.
"""

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor`, which lies in main memory, on `device`; on a GPU the copy is queued."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class KnownMask(Tensor):
    """A mask of zeros and ones on the device, (rows, length), of which the host knows how many are ones.

    Its sum and whether all of it is true are that knowledge, as a number and a truth value; its copy in another dtype
    and a view of all of it have it too, until they are written to. All else is computed as of any tensor and gives
    plain tensors.
    """

    ones: int
    written: int

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> "KnownMask":
        """Return `mask`, which lies in main memory, on `device`."""
        return _knowing(to_device(mask, device), int(mask.numpy().sum()))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer from what is known, or do what any tensor does."""
        mask = args[0]
        asked = func in (Tensor.sum, Tensor.all) and len(args) == 1 and not kwargs
        if asked and isinstance(mask, cls) and mask._version == mask.written:
            return mask.ones if func is Tensor.sum else mask.ones == mask.numel()
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            whole = isinstance(mask, cls) and isinstance(out, Tensor) and out.shape == mask.shape
            if whole and (func in (Tensor.to, Tensor.bool) or out._is_view()):  # a view of this shape is all of it
                return _knowing(out, mask.ones)
        return out


def _knowing(mask: Tensor, ones: int) -> KnownMask:
    known = mask.as_subclass(KnownMask)
    known.ones, known.written = ones, known._version
    return known
