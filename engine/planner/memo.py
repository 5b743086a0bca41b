"""Remembers what operations make of tensors of certain sizes, so that tracing the layers of a model is quick."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


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
