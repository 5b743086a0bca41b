"""Blockwise 8-bit numbers for optimizer states (Dettmers et al., arXiv:2110.02861), by the maps of bitsandbytes.

Of each block of 256 numbers the largest magnitude is kept in fp32, and of each number the nearest of 256 codes: signed
ones for the first moment, unsigned ones for the second. Beside `base_weight.py` the only file that knows bitsandbytes.

On a GPU its kernels quantise. On the CPU its kernel (0.50.2) reads the code from a table of 16 bits, so that all below
a 65,536th of a block's largest number becomes one code: there the nearest code is found in plain torch.
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256  # bitsandbytes, optimizers of 8 bit
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
    numbers = numbers.detach().float()
    book = code_book(signed, numbers.device)
    if numbers.is_cuda:
        from bitsandbytes.functional import quantize_blockwise

        codes, state = quantize_blockwise(numbers, code=book, blocksize=BLOCK)
        scales: Tensor = state.absmax
    else:
        codes, scales = quantize_nearest(numbers, book)
    return codes if signed else codes.clamp_(min=1), scales


def quantize_nearest(numbers: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest code of each number in the scale of its block, and the scales: the definition.

    Args:
        numbers: fp32, any shape.
        book: (256,) ascending.
    """
    count = numbers.numel()
    padded = torch.nn.functional.pad(numbers.flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = torch.linalg.vector_norm(padded, float("inf"), dim=1)
    scaled = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2, out_int32=True)
    return codes.flatten()[:count].view(numbers.shape).to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the numbers, fp32 in the shape of `codes`, that codes and scales stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    book = code_book(signed, codes.device)
    numbers: Tensor = dequantize_blockwise(codes, absmax=scales, code=book, blocksize=BLOCK)
    return numbers
