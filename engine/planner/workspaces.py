"""What CUDA kernels take for themselves while they run, where it is much: it is no result, so no trace sees it."""

from collections.abc import Callable
from typing import Any

from engine.planner.activations import FLASH_HEAD, FLASH_QUERIES, FP32_BYTES

INT64_BYTES = 8


def workspace_rule(func: Any) -> Callable[[tuple[Any, ...]], int] | None:
    """Return what says, by the arguments of an operation, how many bytes its CUDA kernel takes beside its results."""
    return {
        "aten::_scaled_dot_product_flash_attention_backward": lambda args: flash_backward_bytes(
            tuple(args[1].shape), tuple(args[2].shape), args[1].element_size()
        ),
        "aten::embedding_dense_backward": lambda args: sorted_embedding_bytes(args[1].numel()),
    }.get(func.name())


def flash_backward_bytes(query: tuple[int, ...], key: tuple[int, ...], element_bytes: int) -> int:
    """Return what the backward of flash attention takes (Dao-AILab/flash-attention, flash_api.cpp).

    4 b s' heads d' for the sum of the queries' gradient and 4 b heads s' for the row sums, s' the length up to 128, d'
    the head size up to 32; with grouped heads also the gradients of keys and values for every head.

    Args:
        query: (rows, heads, length, head_dim).
        key: (rows, kv_heads, length, head_dim).
        element_bytes: of both.
    """
    rows, heads, length, width = query
    padded = _up(length, FLASH_QUERIES)
    sums = FP32_BYTES * rows * heads * padded * (_up(width, FLASH_HEAD) + 1)
    grouped = 2 * element_bytes * rows * heads * key[2] * width if key[1] != heads else 0
    return sums + grouped


def sorted_embedding_bytes(tokens: int) -> int:
    """Return what the backward of an embedding takes to sort its tokens: five int64 arrays."""
    return 5 * INT64_BYTES * tokens


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
