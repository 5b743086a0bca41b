"""What lets the engine's own code run on the meta device, where tensors have sizes and no numbers.

`Scenario` answers in place of the numbers: whole and boolean tensors that come from the batch or from a range are
computed for real beside their empty twins, so that questions about padding and packing get true answers. What hangs on
trained numbers gets the answer that takes the most memory: every entry of a mask is chosen, every score is finite.
`standing_for` makes the meta device stand for another where Python code asks.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map_only

AttentionKernel = Literal["flash", "efficient", "cpu", "math"]
KNOWN_NUMEL = 2**17  # of what is computed for real: ids, positions and masks a token, not masks a pair of tokens
_FLASH_HEAD_DIM = 256  # the largest head of flash attention on CUDA
_FLASH_ALIGNMENT = 8  # entries; shorter heads are padded to a multiple
_aten = torch.ops.aten
_numpy, _tensor_to, _tensor_cpu, _attention = (
    Tensor.numpy,
    Tensor.to,
    Tensor.cpu,
    functional.scaled_dot_product_attention,
)


class Scenario:
    """Runs operations on meta tensors, and on tensors in main memory that stand for a GPU run's host side.

    Those have their real size but are never written, so they take no memory.
    """

    def __init__(self, count: int, *, on_cpu: bool) -> None:
        """Prepare answers.

        Args:
            count: the answer where a number of entries is asked for that hangs on trained numbers.
            on_cpu: whether the meta device stands for the CPU.
        """
        self._count = count
        self._on_cpu = on_cpu
        self._memo = Memo()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of one operation."""
        if func is _aten._local_scalar_dense.default:
            return self._answer(args[0])
        if func in _UPDATES:
            return None
        if func is _aten.repeat_interleave.Tensor:
            return func(*args, **{**kwargs, "output_size": self._count})
        if func is _aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _in_bfloat16(func, args, kwargs)
        if func in _FACTORIES:
            return self._make(func, args, kwargs)
        if func is _aten._to_copy.default and _leaves_the_device(args[0], kwargs):
            return _hollow(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        first = args[0] if args else None
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if isinstance(first, Tensor):
            if _is_hollow(first):
                return _run_hollow(func, args, kwargs)
            if _known(first) is not None:
                return _run_twice(func, args, kwargs)
        out = self._memo.run(func, args, kwargs)
        if func in _QUESTIONS:
            out.known = torch.tensor(_QUESTIONS[func])
        return out

    def stays(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether an operation copies from main memory to a device that is main memory: nothing is copied."""
        return self._on_cpu and func is _aten._to_copy.default and not args[0].is_meta

    def _answer(self, tensor: Tensor) -> bool | int | float:
        known = _known(tensor)
        if known is not None:
            answer: bool | int | float = known.item()
            return answer
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else self._count

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _aten.randperm.generator and args[0] > KNOWN_NUMEL:
            return _hollow((args[0],), torch.int64)
        out = func(*args, **kwargs)
        if out.is_meta and not out.is_floating_point() and out.numel() <= KNOWN_NUMEL:
            out.known = func(*args, **{**kwargs, "device": "cpu"})
        return out


class Memo:
    """Remembers what an operation makes of tensors of certain sizes: the layers of a model are alike.

    The meta functions of many operations are long Python programs; an empty tensor of a known size is made in no time.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._kinds: dict[Any, Literal["new", "in place", ""]] = {}
        self._made: dict[Any, list[_Made]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on meta tensors."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind_of(func)
        if not kind:
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(tuple(kwargs.items())) if kwargs else None)
        made = self._made.get(key)
        if made is None:
            return self._learn(key, kind, args, kwargs)
        if kind == "in place":
            return args[0]
        new = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made]
        return new[0] if len(new) == 1 else tuple(new)

    def _learn(self, key: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = key[0]
        given = {each.untyped_storage()._cdata for each in tree_flatten(args)[0] if isinstance(each, Tensor)}
        out = func(*args, **kwargs)
        if kind == "in place":
            if out is args[0]:
                self._made[key] = []
            return out
        made = [out] if isinstance(out, Tensor) else [*out]
        if any(isinstance(each, Tensor) and each.untyped_storage()._cdata in given for each in made):
            self._kinds[func] = ""  # a view, whatever its schema says
        elif all(isinstance(each, Tensor) and _fills_its_storage(each) for each in made):
            self._made[key] = [(each.shape, each.stride(), each.dtype) for each in made]
        return out


_Made = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _signature(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.shape, args.stride(), args.dtype, args.is_meta
    if isinstance(args, (tuple, list)):
        return tuple([_signature(each) for each in args])
    return args.__class__, args


def _kind_of(func: Any) -> Literal["new", "in place", ""]:
    """Return whether an operation makes new tensors only, changes its first argument only, or is neither."""
    schema = func._schema
    aliased = [each.alias_info is not None for each in schema.arguments]
    returned = [each.alias_info is not None for each in schema.returns]
    if not any(aliased) and returned and not any(returned):
        return "new" if all(str(each.type) == "Tensor" for each in schema.returns) else ""
    in_place = schema.name.endswith("_") and aliased[0] and not any(aliased[1:]) and returned == [True]
    return "in place" if in_place else ""


def _fills_its_storage(tensor: Tensor) -> bool:
    if not tensor.is_meta:
        return False
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return fresh.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


_FACTORIES = frozenset(
    (
        *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.randperm.generator),
        *(_aten.zeros.default, _aten.ones.default, _aten.full.default),
    )
)
_UPDATES = frozenset((_aten._fused_sgd_.default, _aten._fused_sgd_.tensor_lr))  # no meta kernel; nothing is made
# Of trained numbers: all are finite, none is NaN.
_QUESTIONS = {_aten.all.default: True, _aten.any.default: False}


def _known(tensor: Tensor) -> Tensor | None:
    """Return the real numbers of a meta tensor where they are known; a tensor in main memory is its own."""
    if not tensor.is_meta:
        return None if _is_hollow(tensor) else tensor
    known: Tensor | None = getattr(tensor, "known", None)
    return known


def _run_twice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on meta tensors, and on their real numbers where all of them are known."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and out.is_meta and out.numel() <= KNOWN_NUMEL and not out.is_floating_point():
        if all(_known(each) is not None for each in tensors):
            real_args, real_kwargs = tree_map_only(Tensor, _known, (args, kwargs))
            out.known = func(*real_args, **_to_main_memory(real_kwargs))  # type: ignore[attr-defined]
        elif hasattr(out, "known"):
            del out.known
    return out


def _in_bfloat16(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what the product of a mixture of experts makes of another dtype: its meta function knows bf16 only."""
    twins = [each.bfloat16() if isinstance(each, Tensor) and each.is_floating_point() else each for each in args]
    out = func(*twins, **kwargs)
    return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype, device="meta")


def _to_main_memory(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs


def _leaves_the_device(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy of a meta tensor goes to main memory."""
    device = kwargs.get("device")
    return tensor.is_meta and device is not None and torch.device(device).type == "cpu"


def _hollow(shape: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor in main memory that is never written, so that its pages are never there."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    tensor.hollow = True  # type: ignore[attr-defined]
    return tensor


def _is_hollow(tensor: Tensor) -> bool:
    return not tensor.is_meta and getattr(tensor, "hollow", False)


def _run_hollow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation on hollow tensors gives, without touching them."""
    if func is _aten._to_copy.default and torch.device(kwargs.get("device") or "cpu").type == "meta":
        return func(*args, **kwargs)
    if func.is_view:
        out = func(*args, **kwargs)
        for each in tree_flatten(out)[0]:
            each.hollow = True
        return out
    if func._schema.is_mutable:
        return args[0]
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda each: each.to("meta"), (args, kwargs))
    return tree_map_only(Tensor, lambda each: _hollow(each.shape, each.dtype), func(*meta_args, **meta_kwargs))


def choose_attention(
    on_cpu: bool, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, grouped: bool
) -> AttentionKernel:
    """Return the kernel that `scaled_dot_product_attention` of torch 2.13 picks in training (sdp_utils.cpp).

    CPU: one flash-like kernel, unless there is dropout. CUDA: flash for 16 bit without a mask; else the
    memory-efficient kernel, which takes a mask and fp32 but no grouped heads; else matrix products.
    """
    if on_cpu:
        return "math" if dropout > 0 else "cpu"
    if mask is None and query.element_size() == 2 and query.shape[-1] <= _FLASH_HEAD_DIM:
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
    kernel = choose_attention(on_cpu, query, key, attn_mask, dropout_p, enable_gqa)
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
    numbers read out are any numbers. Where it stands for the CPU, main memory is the device itself.
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
            *(((Tensor, "to", _to), (Tensor, "cpu", _cpu)) if on_cpu else ()),
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
    return _numpy(_hollow(tensor.shape, tensor.dtype) if tensor.is_meta else tensor)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tensor.is_meta:
        args = tuple("meta" if isinstance(each, (str, torch.device)) else each for each in args)
        kwargs = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
    return _tensor_to(tensor, *args, **kwargs)


def _cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else _tensor_cpu(tensor)
