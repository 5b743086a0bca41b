"""The processes of one run, one a card, that share its micro-batches: what they exchange.

Every process holds the same model, the same entries and the same values, and does its own micro-batches. In a step
they sum the gradients of the values, which is all that differs between them; where entries are chosen they sum the
dense gradients too, one weight at a time. Numbers on the host go by gloo, tensors on a GPU by NCCL. torchrun
(`torch.distributed.run`) starts the processes and ends all of them when one dies, so nobody waits for ever.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from engine.errors import WorkerError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # others wait while the first one evaluates; whoever dies is noticed at once
_WORD = "failed"  # where the sentence of a failure lies in the store


class PeerLostError(WorkerError):
    """Another process of the run ended in the middle of it."""


@dataclass(frozen=True)
class Peers:
    """This process among those of its run: number `rank`, from 0, of `count`. Alone, nothing is exchanged.

    All of them call the methods that exchange something in the same order.
    """

    rank: int = 0
    count: int = 1
    store: Any = None

    @classmethod
    def join(cls, count: int, *, on_cpu: bool) -> "Peers":
        """Meet the other processes that torchrun started; wait until all are there.

        Args:
            count: processes of the run; one needs nobody.
            on_cpu: whether the run is there; else each process has a GPU.

        Raises:
            WorkerError: they were not started by torchrun, or as another number.
        """
        if count == 1:
            return ALONE
        if os.environ.get("WORLD_SIZE") != str(count):
            raise WorkerError(
                f"A run with num_processes={count} is started by torchrun with as many, got "
                f"{os.environ.get('WORLD_SIZE', 'none')}. Start it by `python -m engine train`."
            )
        store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        return cls(rank, count, store)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: it alone writes files."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others; all are done."""
        if self.count > 1:
            distributed.destroy_process_group()

    def add(self, tensor: Tensor) -> None:
        """Replace `tensor`, contiguous, by its sum over all processes."""
        if self.count > 1:
            with _together():
                distributed.all_reduce(tensor)

    def add_all(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors` by its sum over all processes, in one exchange; memory: one copy of them."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        self.add(flat)
        for tensor, summed in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Return each number summed over all processes; whole ones below 2**53 exactly. No device is asked."""
        if self.count == 1:
            return [*numbers]
        summed = torch.tensor(numbers, dtype=torch.float64)
        self.add(summed)
        return [float(number) for number in summed]

    def from_first(self, value: T) -> T:
        """Return the value that the first process gave."""
        if self.count == 1:
            return value
        box = [value]
        with _together():
            distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors, in host memory and of one size, that all processes gave, by rank."""
        if self.count == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        with _together():
            distributed.all_gather(found, tensor)
        return found

    @contextmanager
    def one_after_the_first(self) -> Iterator[None]:
        """Let the first process do what follows before the others do: they find what it downloaded and prepared."""
        if not self.is_first:
            self.from_first(None)
        yield
        if self.is_first:
            self.from_first(None)

    def leave_word(self, sentence: str) -> None:
        """Say why this process ends, for the first one to report."""
        if self.store is not None:
            self.store.set(_WORD, sentence)

    def last_word(self) -> str:
        """Return why another process ended, where it could say so."""
        if self.store is None or not self.store.check([_WORD]):
            return ""
        return str(self.store.get(_WORD).decode())


ALONE = Peers()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own, and DistBackendError
        if "out of memory" in str(error):  # NCCL takes memory of its own at the first exchange
            raise
        raise PeerLostError("Another process of the run ended; output.log has its last lines.") from error
