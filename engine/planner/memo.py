"""Remembers what operations make of tensors of certain sizes, so that tracing the layers of a model is quick."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

Kind = Literal["new", "in place", "out", ""]
Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_aten = torch.ops.aten
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype] | tuple[Any]  # of a tensor, or what else is returned


@dataclass(eq=False, slots=True)
class Operation:
    """An operation: what it makes, what runs in its stead where it is special, what it answers of trained numbers.

    `kind`: it makes new tensors only, changes its first argument only, changes `out` only, or is none of these.
    Operations of PyTorch hash slowly, as Python; these are found by the identity of theirs, which live as long.
    """

    func: Any
    kind: Kind
    special: Run | None = None
    answer: bool | None = None


class Memo:
    """Remembers what an operation makes of tensors of certain sizes: the layers of a model are alike.

    The meta functions of many operations are long Python programs; an empty tensor of a known size is made in no time.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._made: dict[Any, list[_Made]] = {}

    def run(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on meta tensors."""
        kind = operation.kind
        if not kind:
            return operation.func(*args, **kwargs)
        key = _key(operation, args, kwargs)
        made = self._made.get(key)
        if made is None:
            return self._learn(key, operation, args, kwargs)
        if kind == "new":
            return _make(made[0]) if len(made) == 1 else tuple([_make(each) for each in made])
        return args[0] if kind == "in place" else kwargs["out"]

    def _learn(self, key: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = operation.func(*args, **kwargs)
        if operation.kind != "new":
            changed = args[0] if operation.kind == "in place" else kwargs["out"]
            # It has the size that it had, and no numbers that change: those of main memory count steps.
            if out is changed and changed.is_meta and key == _key(operation, args, kwargs):
                self._made[key] = []
            return out
        made = [*out] if isinstance(out, tuple) else [out]
        storages = [each.untyped_storage()._cdata for each in made if isinstance(each, Tensor)]
        given = {each.untyped_storage()._cdata for each in tree_flatten(args)[0] if isinstance(each, Tensor)}
        if not given.isdisjoint(storages):
            operation.kind = ""  # a view, whatever its schema says
            if operation.func is _aten._unsafe_view.default:
                operation.func = _aten.view.default  # the same in no Python
        elif len(storages) == len({*storages}) and all(_can_be_made(each) for each in made):
            self._made[key] = [_size_of(each) for each in made]
        return out


def kind_of(func: Any) -> Kind:
    """Return whether an operation makes new tensors only, changes its first argument or `out` only, or is neither."""
    schema = func._schema
    aliased = [each.alias_info is not None for each in schema.arguments]
    returned = [each.alias_info is not None for each in schema.returns]
    if not any(aliased) and returned and not any(returned):
        return "" if any("[]" in str(each.type) for each in schema.returns) else "new"
    if returned != [True]:
        return ""
    if schema.name.endswith("_") and aliased[0] and not any(aliased[1:]):
        return "in place"
    outs = [each.name for each, changed in zip(schema.arguments, aliased, strict=True) if changed]
    return "out" if outs == ["out"] else ""


def _key(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return id(operation), _signature(args), _signature(tuple(kwargs.items())) if kwargs else None


def _signature(args: Any) -> Any:
    return tuple(
        [
            (each.shape, each.stride(), each.dtype, each.is_meta)
            if isinstance(each, Tensor)
            else _signature(each)
            if isinstance(each, (tuple, list))
            else (each.__class__, each)
            for each in args
        ]
    )


def _make(made: _Made) -> Any:
    if len(made) == 1:
        return made[0]
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _size_of(result: Any) -> _Made:
    return (result.shape, result.stride(), result.dtype) if isinstance(result, Tensor) else (result,)


def _can_be_made(result: Any) -> bool:
    """Return whether a result is a tensor on the meta device that fills its storage, or no tensor."""
    if not isinstance(result, Tensor):
        return result is None or isinstance(result, (int, float))
    if not result.is_meta:
        return False
    fresh = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    return fresh.untyped_storage().nbytes() == result.untyped_storage().nbytes()
