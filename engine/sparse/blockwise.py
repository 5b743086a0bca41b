"""Blockwise 8-bit numbers for optimizer states (Dettmers et al., arXiv:2110.02861), by the maps of bitsandbytes.

Of each block of 256 numbers the largest magnitude is kept in fp32, and of each number the nearest of 256 codes: signed
ones for the first moment, unsigned ones for the second. Beside `base_weight.py` the only file that knows bitsandbytes.

Codes and their numbers are those of bitsandbytes, the nearest code is found in plain torch. Of its own kernels (0.50.2)
the one for the CPU reads codes from a table of 16 bits, so that all below a 65,536th of a block's largest number become
one; the one for GPUs runs on the legacy default stream, whichever stream is current (its pull request 2052).
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256  # bitsandbytes, optimizers of 8 bit
_DROPPED_BITS = 15  # of fp32; see `_search_table`
FEWEST = 4096  # smaller tensors stay in fp32: bitsandbytes, min_8bit_size


@lru_cache(maxsize=8)
def code_book(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 numbers in [-1, 1] or [0, 1] that the codes stand for, ascending, fp32."""
    from bitsandbytes.functional import create_dynamic_map

    book: Tensor = create_dynamic_map(signed=signed).to(device)
    return book


def quantize(numbers: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes of `numbers`, uint8 in their shape, and the largest magnitude of each block, (blocks,) fp32.

    An unsigned code is never that of zero: a second moment of zero beside a first one that is not would make a step
    of any size (the zero-point problem of arXiv:2309.01507).

    Args:
        numbers: any shape and float dtype; not negative where `signed` is false.
        signed: which code book.
    """
    count = numbers.numel()
    padded = torch.nn.functional.pad(numbers.detach().float().flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = torch.maximum(padded.amax(1), -padded.amin(1))
    scaled = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[:count]
    del padded
    codes = _nearest(scaled, signed).to(torch.uint8).view(numbers.shape)
    return codes if signed else codes.clamp_(min=1), scales


def _nearest(scaled: Tensor, signed: bool) -> Tensor:
    """Return the nearest code, int32, of each number in [-1, 1]: looked up by its first bits, then compared once."""
    first, limits = _search_table(signed, scaled.device)
    codes = first.index_select(0, (scaled.view(torch.int32) >> _DROPPED_BITS).bitwise_and_(len(first) - 1))
    return codes.add_(scaled > limits.index_select(0, codes))


@lru_cache(maxsize=8)
def _search_table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lowest code among fp32 numbers of equal first bits, (2^17,) int32, and the upper limit of each code.

    Numbers of equal sign, exponent and first 8 bits of the fraction differ by less than a 256th, codes by more than a
    150th: at most one limit lies between them.
    """
    book = code_book(signed, device)
    limits = torch.cat(((book[1:] + book[:-1]) / 2, book.new_tensor([float("inf")])))
    lowest = torch.arange(-(2**31), 2**31, 1 << _DROPPED_BITS, device=device).int()
    bounds = torch.stack((lowest, lowest | (1 << _DROPPED_BITS) - 1)).view(torch.float32)
    codes = torch.bucketize(bounds.amin(0), limits[:-1], out_int32=True)
    return codes.roll(len(codes) // 2), limits


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the numbers, fp32 in the shape of `codes`, that codes and scales stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    book = code_book(signed, codes.device)
    numbers: Tensor = dequantize_blockwise(codes, absmax=scales, code=book, blocksize=BLOCK)
    return numbers
