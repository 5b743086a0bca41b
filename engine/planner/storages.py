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
from engine.planner.workspaces import workspace_rule

_BACKWARD_OF = "backward of "
# An operation, its name, whether it makes storages, what its kernel takes; by its identity, as operations hash slowly.
_Traits = tuple[Any, str, bool, Callable[[tuple[Any, ...]], int] | None]


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
        self._traits: dict[int, _Traits] = {}
        self._modules = _ModuleClock()

    def watch_modules(self, model: nn.Module) -> None:
        """Note from now on which module of `model` is at work."""
        self._modules.watch(model)

    def adopt(self, tensor: Tensor, part: str) -> None:
        """Say what part the storage of `tensor` is; it counts from now on if it did not before."""
        number = self._live.get(tensor.untyped_storage()._cdata)
        if number is None:
            self._open(tensor.untyped_storage(), "", part)
        else:
            self.ledger.storages[number].part = part

    def adopt_new(self, tensor: Tensor, part: str) -> None:
        """As `adopt`, for a storage of which nobody has said what it is."""
        number = self._live.get(tensor.untyped_storage()._cdata)
        if number is None or not self.ledger.storages[number].part:
            self.adopt(tensor, part)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile, and a guard against it would run around each operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note the storages that it makes."""
        kwargs = kwargs or {}
        scenario = self._scenario
        out = scenario.run(func, args, kwargs) if scenario is not None else func(*args, **kwargs)
        traits = self._traits.get(id(func))
        if traits is None:
            rule = workspace_rule(func) if self._workspaces else None
            traits = self._traits[id(func)] = (func, str(func), _makes_storages(func), rule)
        _, name, makes, rule = traits
        if makes and not (scenario is not None and scenario.stays(func, args)):
            if isinstance(out, Tensor):
                self._note(out, name)
            elif isinstance(out, (tuple, list)):
                for each in out:
                    if isinstance(each, Tensor):
                        self._note(each, name)
        if rule is not None and (size := rule(args)):
            self.ledger.close(self.ledger.open(size, name, self._where(), "workspace"))
        return out

    def _note(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._open(storage, operation, HOST if self._scenario is not None and not tensor.is_meta else "")

    def _open(self, storage: torch.UntypedStorage, operation: str, part: str) -> None:
        num_bytes = storage.nbytes()
        if not num_bytes:
            return
        key = storage._cdata
        self._live[key] = self.ledger.open(num_bytes, operation, self._where(), part)
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
