"""A GPU that is not there: tensors that say they lie on `cuda:0`, compute on the CPU, and refuse to mix.

What runs here runs the code for a GPU, line by line: an operation over a tensor of the device and one of main memory
fails as it would there, but for those that a real device allows. Streams, events and pinned memory do nothing, and
memory figures are made up, so that neither order nor size is shown, only that everything lies where it has to.

`load` comes before the first import of torch.
"""

import ctypes
import json
import os
import sys
from types import SimpleNamespace
from typing import Any, NoReturn

GIB = 2**30


def load(guard: str) -> None:
    """Load the compiled `guard.cpp`, by which PyTorch takes the device for one."""
    assert "torch" not in sys.modules, "too late: PyTorch has looked for its devices already"
    ctypes.CDLL(guard, ctypes.RTLD_GLOBAL)


def say(found: object) -> NoReturn:
    """Print `found` as JSON and end the process, without PyTorch's farewell to the threads of a device.

    Those of a device that is not there it does not always end, and is ended itself for it.
    """
    print(json.dumps(found), flush=True)
    os._exit(0)


def stand_in() -> Any:
    """Return a context in which what is made on `cuda` is of the device; it changes this process for good."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    aten = torch.ops.aten
    # A real device copies from and to main memory, and is indexed from there.
    mixes = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
    mixes |= {aten._index_put_impl_.default, aten.index_put.default}

    class OnDevice(torch.Tensor):
        numbers: torch.Tensor

        @staticmethod
        def __new__(cls, numbers: torch.Tensor) -> "OnDevice":
            like = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
            made = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), device="cuda:0", **like)
            made.numbers = numbers
            return made

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

        @property
        def data(self) -> torch.Tensor:
            return self.detach()

        @data.setter
        def data(self, new: "OnDevice") -> None:
            torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
            self.numbers = new.numbers

        def tolist(self) -> Any:
            return self.numbers.tolist()

    def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        here = [each for each in tensors if isinstance(each, OnDevice)]
        elsewhere = [each for each in tensors if not isinstance(each, OnDevice)]
        if here and func not in mixes and any(each.dim() for each in elsewhere):
            raise RuntimeError(f"{func} over tensors of cuda:0 and cpu")
        if elsewhere and here and func is aten.index.Tensor and args[0] is elsewhere[0]:
            raise RuntimeError("a tensor of main memory indexed by one of cuda:0")
        asked = kwargs.get("device")
        on_device = bool(here) if asked is None else torch.device(asked).type == "cuda"
        plain_args, plain = tree_map(lambda each: each.numbers if isinstance(each, OnDevice) else each, (args, kwargs))
        if asked is not None:
            plain["device"] = torch.device("cpu")
        out = func(*plain_args, **plain)
        known = {id(each.numbers): each for each in here} | {id(each): each for each in elsewhere}

        def place(each: Any) -> Any:
            if not isinstance(each, torch.Tensor) or id(each) in known:
                return known.get(id(each), each)
            return OnDevice(each) if on_device else each

        return tree_map(place, out)

    class StandIn(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

    made = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        numbers = made(data, *args, **kwargs)  # which goes to a device behind the back of a dispatch mode
        return numbers.to("cuda:0") if device is not None and torch.device(device).type == "cuda" else numbers

    def new_tensor(like: torch.Tensor, data: Any) -> torch.Tensor:
        return tensor(data, dtype=like.dtype, device=like.device)

    torch.tensor, torch.Tensor.new_tensor = tensor, new_tensor  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _pretend(torch)
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    return StandIn()


class _Idle:
    """A stream or an event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Idle":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def _pretend(torch: Any) -> None:
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "stand-in",
        "get_device_capability": (8, 9),
        "get_device_properties": SimpleNamespace(name="stand-in", total_memory=24 * GIB, major=8, minor=9),
        "mem_get_info": (23 * GIB, 24 * GIB),
        "memory_allocated": GIB,
        "memory_reserved": GIB,
        "max_memory_allocated": GIB,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "current_stream": _Idle(),
        "stream": _Idle(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.Stream = torch.cuda.Event = _Idle
