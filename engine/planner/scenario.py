"""What lets the engine's own code run on the meta device, where tensors have sizes and no numbers.

`Scenario` answers in place of the numbers: whole and boolean tensors that come from the batch or from a range are
computed for real beside their empty twins, so that questions about padding and packing get true answers. What hangs on
trained numbers gets the answer that takes the most memory: every entry of a mask is chosen, every score is finite.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from engine.planner.memo import Memo, Operation, Run, kind_of

KNOWN_NUMEL = 2**17  # of what is computed for real: ids, positions and masks a token, not masks a pair of tokens
BOUNDS = 2  # where a slice begins and ends
_aten = torch.ops.aten


class Scenario:
    """Runs operations on meta tensors, and on tensors in main memory that stand for a GPU run's host side.

    Those have their real size but are never written, so they take no memory.
    """

    def __init__(self, counts: Mapping[int, int], *, on_cpu: bool) -> None:
        """Prepare answers.

        Args:
            counts: the answers where a number of entries is asked for that hangs on trained numbers, by the rows of a
                weight; where those are not known, the largest.
            on_cpu: whether the meta device stands for the CPU.
        """
        self._counts, self._count = counts, max(counts.values())
        self._on_cpu = on_cpu
        self._memo = Memo()
        self._operations: dict[int, Operation] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of one operation."""
        operation = self._operations.get(id(func))
        if operation is None:
            operation = self._operations[id(func)] = Operation(
                func, kind_of(func), self._special(func), _QUESTIONS.get(func)
            )
        if operation.special is not None:
            return operation.special(func, args, kwargs)
        return self._plain(operation, args, kwargs)

    def _plain(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if isinstance(first, Tensor):
            if first.is_meta:
                if getattr(first, "known", None) is not None:
                    return self._run_twice(operation, args, kwargs)
            elif _is_hollow(first):
                return _run_hollow(operation.func, args, kwargs)
            else:
                return self._run_twice(operation, args, kwargs)
        out = self._memo.run(operation, args, kwargs)
        if operation.answer is not None:
            out.known = torch.tensor(operation.answer)
        return out

    def _special(self, func: Any) -> Run | None:
        """Return what runs in the stead of an operation whose result is more, or less, than a tensor of some size."""
        if func in _UPDATES:
            return lambda *_: None
        if func in _FACTORIES:
            return self._make
        return {
            _aten._local_scalar_dense.default: lambda _, args, __: self._answer(args[0]),
            _aten.repeat_interleave.Tensor: self._repeat,
            _aten.unique_consecutive.default: self._tell_apart,
            _aten._grouped_mm.default: self._multiply,
            _aten._to_copy.default: self._copy,
        }.get(func)

    def _repeat(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = kwargs.get("output_size") or self._counts.get(args[0].numel(), self._count)
        return func(*args, **{**kwargs, "output_size": size})

    def _tell_apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the different ones of a tensor's numbers: all of them, where these are not there."""
        if not _is_hollow(args[0]):
            return func(*args, **kwargs)
        empty = torch.empty(0, dtype=torch.int64, device="cpu")  # of what was not asked for
        return _hollow(args[0].shape, args[0].dtype), empty, empty

    def _multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].dtype != torch.bfloat16:
            return _in_bfloat16(func, args, kwargs)
        return self._plain(self._operations[id(func)], args, kwargs)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _leaves_the_device(args[0], kwargs):
            out = _hollow(args[0].shape, kwargs.get("dtype") or args[0].dtype)
            if out.dtype == torch.int64 and out.numel() == BOUNDS:  # of a slice, which is taken as all there is
                out[0], out[-1] = 0, torch.iinfo(out.dtype).max
            return out
        return self._plain(self._operations[id(func)], args, kwargs)

    def _run_twice(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on meta tensors, and on their real numbers where all of them are known."""
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        out = self._memo.run(operation, args, kwargs)
        if isinstance(out, Tensor) and out.is_meta and out.numel() <= KNOWN_NUMEL and not out.is_floating_point():
            if all(_known(each) is not None for each in tensors):
                real_args, real_kwargs = tree_map_only(Tensor, _known, (args, kwargs))
                out.known = operation.func(*real_args, **_to_main_memory(real_kwargs))  # type: ignore[attr-defined]
            elif hasattr(out, "known"):
                del out.known
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
        if func is _aten.randint.generator and math.prod(args[1]) > KNOWN_NUMEL:
            return _hollow(args[1], torch.int64)
        out = func(*args, **kwargs)
        if out.is_meta and not out.is_floating_point() and out.numel() <= KNOWN_NUMEL:
            out.known = func(*args, **{**kwargs, "device": "cpu"})
        return out


_FACTORIES = frozenset(
    (
        *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step),
        *(_aten.randperm.generator, _aten.randint.generator),
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
    """Return a tensor in main memory that is never written, so that its pages are never there; a small one is zeros."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if tensor.numel() <= KNOWN_NUMEL:
        tensor.zero_()  # who reads it finds the same each time
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
