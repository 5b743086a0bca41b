"""Counts the storages that operations make and free, on any device: real ones, or those of the meta device.

A dispatch mode sees every operation below autograd, in forward and backward, in the order in which a device would run
them. What an operation takes and gives back inside one kernel it cannot see; `workspaces.py` knows the large ones.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.planner.ledger import HOST, LOSS, LOSS_BACKWARD, Ledger
from engine.planner.scenario import Scenario
from engine.planner.workspaces import workspace_of

_BACKWARD_OF = "backward of "


class StorageMeter(TorchDispatchMode):
    """Writes into a `Ledger` what happens to storages while it is active; `scenario` answers on the meta device."""

    def __init__(self, scenario: Scenario | None = None, *, workspaces: bool = False) -> None:
        """Begin with nothing.

        Args:
            scenario: for models on the meta device.
            workspaces: count the memory that CUDA kernels take for themselves.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self._scenario = scenario
        self._workspaces = workspaces
        self._live: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._makes: dict[Any, bool] = {}
        self._modules = _ModuleClock()

    def watch_modules(self, model: nn.Module) -> None:
        """Note from now on which module of `model` is at work."""
        self._modules.watch(model)

    def adopt(self, tensor: Tensor, part: str) -> None:
        """Say what part the storage of `tensor` is; it counts from now on if it did not before."""
        number = self._live.get(tensor.untyped_storage()._cdata)
        if number is None:
            self._open(tensor, "", part)
        else:
            self.ledger.storages[number].part = part

    def adopt_new(self, tensor: Tensor, part: str) -> None:
        """As `adopt`, for a storage of which nobody has said what it is."""
        number = self._live.get(tensor.untyped_storage()._cdata)
        if number is None or not self.ledger.storages[number].part:
            self.adopt(tensor, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note the storages that it makes."""
        kwargs = kwargs or {}
        out = self._scenario.run(func, args, kwargs) if self._scenario is not None else func(*args, **kwargs)
        makes = self._makes.get(func)
        if makes is None:
            makes = self._makes[func] = _makes_storages(func)
        if makes and not (self._scenario is not None and self._scenario.stays(func, args)):
            if isinstance(out, Tensor):
                self._note(out, func)
            elif isinstance(out, (tuple, list)):
                for each in out:
                    if isinstance(each, Tensor):
                        self._note(each, func)
        if self._workspaces and (size := workspace_of(func, args)):
            self.ledger.close(self.ledger.open(size, str(func), self._where(), "workspace"))
        return out

    def _note(self, tensor: Tensor, func: Any) -> None:
        if tensor.untyped_storage()._cdata not in self._live:
            on_host = self._scenario is not None and not tensor.is_meta
            self._open(tensor, str(func), HOST if on_host else "")

    def _open(self, tensor: Tensor, operation: str, part: str) -> None:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return
        key = storage._cdata
        self._live[key] = self.ledger.open(storage.nbytes(), operation, self._where(), part)
        self._references[key] = weakref.ref(storage, self._closer(key))

    def _closer(self, key: int) -> Callable[[Any], None]:
        def close(_: Any) -> None:
            self.ledger.close(self._live.pop(key))
            del self._references[key]

        return close

    def _where(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._modules.now
        if self.ledger.phase == LOSS:
            self.ledger.enter(LOSS_BACKWARD)
        return _BACKWARD_OF + self._modules.at(node._sequence_nr())


def _makes_storages(func: Any) -> bool:
    """Return whether an operation may return a storage that was not there before."""
    returns = func._schema.returns
    return any(each.alias_info is None for each in returns)


class _ModuleClock:
    """Which module was at work when an autograd node was made: nodes and modules count by one clock."""

    def __init__(self) -> None:
        self.now = ""
        self._starts: list[int] = [0]
        self._names: list[str] = [""]

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave(name.rpartition(".")[0]))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self._tick(name)

    def _leave(self, parent: str) -> Callable[..., None]:
        return lambda *_: self._tick(parent)

    def _tick(self, name: str) -> None:
        self.now = name
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._names.append(name)

    def at(self, sequence: int) -> str:
        return self._names[bisect_right(self._starts, sequence) - 1]
