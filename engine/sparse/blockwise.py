"""Blockwise 8-bit numbers for optimizer states (Dettmers et al., arXiv:2110.02861), by the maps of bitsandbytes.

Of each block of 256 numbers the largest magnitude is kept in fp32, and of each number the nearest of 256 codes: signed
ones for the first moment, unsigned ones for the second. Beside `base_weight.py` the only file that knows bitsandbytes.

Codes and their numbers are those of bitsandbytes, the nearest code is found in plain torch. Of its own kernels (0.50.2)
the one for the CPU reads codes from a table of 16 bits, so that all below a 65,536th of a block's largest number become
one; the one for GPUs runs on the legacy default stream, whichever stream is current (its pull request 2052).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_BITS = 8
BLOCK = 1 << _BLOCK_BITS  # bitsandbytes, optimizers of 8 bit
_DROPPED_BITS = 15  # of fp32; see `code_tables`
FEWEST = 4096  # smaller tensors stay in fp32: bitsandbytes, min_8bit_size


class CodeTables(NamedTuple):
    """What codes are found and read by.

    `book`: (256,) the numbers they stand for; `first`: (2^17,) int32, the lowest code among fp32 numbers of equal first
    bits; `limits`: (256,) the upper limit of each code; `least`: the lowest code that is used.
    """

    book: Tensor
    first: Tensor
    limits: Tensor
    least: int


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
    return encode(numbers, code_tables(signed, numbers.device))


def encode(numbers: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Return what `quantize` does, by tables at hand: plain torch, to be compiled."""
    count = numbers.numel()
    padded = torch.nn.functional.pad(numbers.detach().float().flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = torch.maximum(padded.amax(1), -padded.amin(1))
    scaled = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[:count]
    del padded
    # A view only before the conversion: compiled code takes codes that are views for others than those that it made.
    codes = _nearest(scaled, tables).view(numbers.shape).to(torch.uint8)
    return codes.clamp_(min=tables.least) if tables.least else codes, scales


def decode(codes: Tensor, scales: Tensor, tables: CodeTables) -> Tensor:
    """Return what `dequantize` does, by tables at hand: plain torch, to be compiled."""
    # Not // BLOCK: compiled for a CPU by torch 2.13 that goes wrong in a last block that is not full.
    block = torch.arange(codes.numel(), device=codes.device) >> _BLOCK_BITS
    return tables.book.index_select(0, codes.flatten().int()).mul_(scales.index_select(0, block)).view(codes.shape)


def _nearest(scaled: Tensor, tables: CodeTables) -> Tensor:
    """Return the nearest code, int32, of each number in [-1, 1]: looked up by its first bits, then compared once."""
    first = tables.first
    codes = first.index_select(0, (scaled.view(torch.int32) >> _DROPPED_BITS).bitwise_and_(len(first) - 1))
    return codes.add_(scaled > tables.limits.index_select(0, codes))


@lru_cache(maxsize=8)
def code_tables(signed: bool, device: torch.device) -> CodeTables:
    """Return the tables of the codes of signed or unsigned numbers.

    Numbers of equal sign, exponent and first 8 bits of the fraction differ by less than a 256th, codes by more than a
    150th: at most one limit lies between them.
    """
    book = code_book(signed, device)
    limits = torch.cat(((book[1:] + book[:-1]) / 2, book.new_tensor([float("inf")])))
    lowest = torch.arange(-(2**31), 2**31, 1 << _DROPPED_BITS, device=device).int()
    bounds = torch.stack((lowest, lowest | (1 << _DROPPED_BITS) - 1)).view(torch.float32)
    codes = torch.bucketize(bounds.amin(0), limits[:-1], out_int32=True)
    return CodeTables(book, codes.roll(len(codes) // 2), limits, least=0 if signed else 1)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the numbers, fp32 in the shape of `codes`, that codes and scales stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    book = code_book(signed, codes.device)
    numbers: Tensor = dequantize_blockwise(codes, absmax=scales, code=book, blocksize=BLOCK)
    return numbers
