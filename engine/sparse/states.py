"""How AdamW's states are kept from one update to the next: in fp32 or 8 bit, on the device or in host memory.

8 bit: the moments of a tensor of 4,096 entries or more are blockwise codes (`blockwise.py`) and are fp32 for the length
of its update. Host memory: the states of each tensor come to the device for the length of its update; on a GPU the
memory is pinned and the next tensor's states travel on a stream of their own meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from engine.sparse.blockwise import FEWEST, dequantize, quantize

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
SCALES = "_scales"  # exp_avg holds codes where exp_avg_scales is there
_LAST_AGE = torch.iinfo(torch.int16).max  # 1 - 0.999^32767 is 1 in fp32


@dataclass
class Moments:
    """AdamW's states of one tensor, ready for an update.

    `exp_avg`, `exp_avg_sq`: (num_active,) in the dtype of the values; `age`: updates behind each entry, (num_active,)
    int16 or int32, or one fp32 number where all entries are of one age.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor


@dataclass(frozen=True)
class StateStore:
    """Keeps `Moments` as a dictionary of tensors, which is what checkpoints hold.

    `eight_bit`: the moments as blockwise codes, ages as int16, which end at 32,767: there both bias corrections are 1
    in fp32. `offload`: in host memory.
    """

    eight_bit: bool = False
    offload: bool = False

    def begin(self, values: nn.Parameter, *, aged: bool) -> dict[str, Tensor]:
        """Return states of zero for `values`; `aged`: with the age of each entry instead of one for all."""
        zeros = torch.zeros_like(values).detach()
        age = zeros.to(self._age_dtype(zeros.numel())) if aged else zeros.new_zeros((), dtype=torch.float32)
        return self.place(self.pack(Moments(zeros, zeros.clone(), age)), values.device)

    def pack(self, moments: Moments) -> dict[str, Tensor]:
        """Return the tensors to keep; those in fp32 are the ones of `moments`."""
        packed = {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq, "age": moments.age}
        count = moments.exp_avg.numel()
        if moments.age.dim() and moments.age.dtype != self._age_dtype(count):  # the tensor grew or shrank
            packed["age"] = moments.age.clamp(max=_LAST_AGE).to(self._age_dtype(count))
        if self._quantised(count):
            for name, signed in SIGNED.items():
                packed[name], packed[name + SCALES] = quantize(packed[name], signed=signed)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], values: nn.Parameter) -> Moments:
        """Return the moments of `values`, in their dtype; fp32 ones are those of `packed`, to be changed in place."""
        exp_avg, exp_avg_sq = (
            dequantize(packed[name], packed[name + SCALES], signed=signed).to(values.dtype)
            if name + SCALES in packed
            else packed[name]
            for name, signed in SIGNED.items()
        )
        return Moments(exp_avg, exp_avg_sq, packed["age"])

    def place(self, packed: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return `packed` where it is kept: on `device`, or in host memory but for the one age of all entries."""
        host = self.offload and device.type == "cuda"
        return {
            name: tensor.cpu().pin_memory() if host and tensor.dim() else tensor.to(device)
            for name, tensor in packed.items()
        }

    def visit(self, states: Sequence[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Yield each of `states` on `device`; what the caller puts into it, or changes, is kept.

        In host memory beside a GPU: at most three tensors' states are on the device at a time, one being updated, one
        coming and one going.
        """
        if self.offload and device.type == "cuda":
            yield from _through_device(states, device)
        else:
            yield from states

    def _quantised(self, count: int) -> bool:
        return self.eight_bit and count >= FEWEST

    def _age_dtype(self, count: int) -> torch.dtype:
        return torch.int16 if self._quantised(count) else torch.int32


def _through_device(states: Sequence[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield each of `states` on `device`, brought there and back beside the updates.

    Order between the streams is kept by waiting and by holding tensors as long as the other stream needs them. With
    `record_stream` memory would come back only when the device has passed the use of it: the host, which is ahead,
    would take more, up to that of all states.
    """
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)  # which has waited for what the update before wrote into host memory

    def bring(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        with torch.cuda.stream(side):
            here = {name: tensor.to(device, non_blocking=True) for name, tensor in state.items()}
            return here, side.record_event()

    going: list[dict[str, Tensor]] = []
    coming = bring(states[0]) if states else None
    try:
        for place, state in enumerate(states):
            assert coming is not None
            here, arrived = coming
            current.wait_event(arrived)
            del going[:-1]  # of two tensors ago: these came after those had gone
            coming = bring(states[place + 1]) if place + 1 < len(states) else None
            yield here
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for name, tensor in here.items():
                    if tensor is not state[name]:
                        state[name].copy_(tensor, non_blocking=True)
            going.append(here)
    finally:
        current.wait_stream(side)  # whoever waits for the device finds host memory written; nobody has to wait here


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies: one, since the allocator keeps the memory of each stream for itself."""
    return torch.cuda.Stream(device)
