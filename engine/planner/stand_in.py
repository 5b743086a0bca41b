"""Makes the meta device stand for the CPU or a CUDA device where Python code asks what the device can do.

Above all the attention kernel, whose memory the choice decides: that of the device a run is planned for is called.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine.train import choosing

AttentionKernel = Literal["flash", "efficient", "cpu", "math"]
_FLASH_HEAD_DIM = 256  # the largest head of flash attention on CUDA
_FLASH_ALIGNMENT = 8  # entries; shorter heads are padded to a multiple
_aten = torch.ops.aten
_dropout = functional.dropout
_numpy, _tensor_to, _tensor_cpu, _attention = (
    Tensor.numpy,
    Tensor.to,
    Tensor.cpu,
    functional.scaled_dot_product_attention,
)


def choose_attention(
    on_cpu: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, grouped: bool
) -> AttentionKernel:
    """Return the kernel that `scaled_dot_product_attention` of torch 2.13 picks in training (sdp_utils.cpp).

    CPU: one flash-like kernel, unless there is dropout. CUDA: flash for 16 bit without a mask; else the
    memory-efficient kernel, which takes a mask and fp32 but no grouped heads; else matrix products. Neither flash takes
    values of another width than queries and keys. No kernel repeats a head that is not said to be grouped, and that of
    the CPU has no gradient of the mask.
    """
    even = query.shape[-1] == value.shape[-1]
    if not grouped and query.shape[:2] != key.shape[:2]:
        return "math"
    if on_cpu:
        learnt = mask is not None and mask.requires_grad
        return "cpu" if even and not dropout and not learnt else "math"
    if even and mask is None and query.element_size() == 2 and query.shape[-1] <= _FLASH_HEAD_DIM:
        return "flash"
    return "math" if grouped and query.shape[1] != key.shape[1] else "efficient"


def attend(
    on_cpu: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what `scaled_dot_product_attention` does by the kernel of the target; returns (rows, heads, length, dim)."""
    attended: Tensor
    kernel = choose_attention(on_cpu, query, key, value, attn_mask, dropout_p, enable_gqa)
    if kernel == "math":
        attended = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return attended
    bias = _additive(attn_mask, query.dtype)
    if kernel == "cpu":
        out = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )
    elif kernel == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    else:
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        out = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )
    attended = out[0]
    return attended


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float | None) -> Tensor:
    width = query.shape[-1]
    missing = -width % _FLASH_ALIGNMENT
    if missing:
        scale = 1 / math.sqrt(width) if scale is None else scale
        query, key, value = (functional.pad(each, (0, missing)) for each in (query, key, value))
    out: Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[
        0
    ]
    return out[..., :width] if missing else out


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a boolean mask as the numbers that are added to the scores: the kernels take no other."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device))


@contextmanager
def standing_for(on_cpu: bool) -> Iterator[None]:
    """Let the meta device stand for the CPU, or for a CUDA device, where Python code asks what the device can do.

    Attention takes the kernel of that device; fused optimizers are allowed; every entry of a mask counts as true;
    numbers read out are any numbers; this computer's main memory sets no limit. Where it stands for the CPU, main
    memory is the device itself.
    """
    from torch.fx.experimental import _config
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    fused = [*_foreach_utils._get_fused_kernels_supported_devices(), "meta"]
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (functional, "scaled_dot_product_attention", partial(attend, on_cpu)),
            (optimizer, "_get_fused_kernels_supported_devices", lambda: fused),
            (_config, "meta_nonzero_assume_all_nonzero", True),
            (Tensor, "numpy", _any_numbers),
            (choosing, "free_memory_bytes", lambda: sys.maxsize),
            *(((Tensor, "to", _to), (Tensor, "cpu", _cpu)) if on_cpu else ((functional, "dropout", _fused_dropout),)),
        ):
            stack.enter_context(_replaced(owner, name, stand_in))
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _any_numbers(tensor: Tensor) -> Any:
    return _numpy(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor)


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Return what dropout on CUDA does: a kernel that keeps one byte an entry, where other devices keep a number."""
    if not training or p in (0.0, 1.0):
        return _dropout(input, p, training, inplace)
    out: Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tensor.is_meta:
        args = tuple("meta" if isinstance(each, (str, torch.device)) else each for each in args)
        kwargs = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
    return _tensor_to(tensor, *args, **kwargs)


def _cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else _tensor_cpu(tensor)
