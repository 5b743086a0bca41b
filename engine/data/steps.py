"""Which rows make which micro-batch of which optimizer step, and the micro-batches themselves, made ahead.

The order is a pure function of the seed and the step: epoch e walks through a permutation of the rows drawn from
(seed, e); step t takes the next `micro_batch_size * gradient_accumulation * num_processes` rows, across the border of
an epoch where one ends. So each row is seen once an epoch, every step has the same number of rows, and a resumed run
sees what an unbroken one would have seen. Of n processes the first does the 1st, (n + 1)th, ... micro-batch of a step.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.batches import AnyExample, Batch, pad_of, stack
from engine.data.examples import Example
from engine.spec import RunSpec


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one optimizer step that one process does; the counts are of the whole step."""

    batches: list[Batch]
    labelled_tokens: int
    tokens: int

    def pinned(self) -> "StepBatches":
        """Return the same in memory from which a GPU copies by itself."""
        return replace(self, batches=[batch.pinned() for batch in self.batches])


def steps_in_run(num_examples: int, spec: RunSpec) -> int:
    """Return the optimizer steps of a run: `max_steps`, else those that see `epochs` times every example."""
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, math.ceil(spec.epochs * num_examples / _step_rows(spec)))


def _step_rows(spec: RunSpec) -> int:
    return spec.micro_batch_size * spec.gradient_accumulation * spec.num_processes


def step_batches(examples: Sequence[AnyExample], spec: RunSpec, step: int) -> list[Batch]:
    """Return the micro-batches of one optimizer step, those of all processes."""
    whole = {"num_processes": 1, "gradient_accumulation": spec.gradient_accumulation * spec.num_processes}
    return take_step(examples, spec.model_copy(update=whole), step).batches


def take_step(examples: Sequence[AnyExample], spec: RunSpec, step: int, rank: int = 0) -> StepBatches:
    """Return what process number `rank` does of one optimizer step: a pure function of seed and step.

    Args:
        examples: at least one.
        spec: `seed`, `micro_batch_size`, `gradient_accumulation`, `num_processes`.
        step: from 1.
        rank: from 0.

    Returns:
        `gradient_accumulation` batches of `micro_batch_size` rows, and the counts of all processes' batches.
    """
    first, size = (step - 1) * _step_rows(spec), spec.micro_batch_size
    rows = [examples[row_at(place, len(examples), spec.seed)] for place in range(first, first + _step_rows(spec))]
    starts = range(rank * size, len(rows), spec.num_processes * size)
    pad_id = pad_of(examples)
    return StepBatches(
        [stack(rows[start : start + size], pad_id) for start in starts],
        sum(row.labelled_tokens if isinstance(row, Example) else 1 for row in rows),
        sum(len(row.input_ids) for row in rows),
    )


def row_at(place: int, num_examples: int, seed: int) -> int:
    """Return which of a run's examples is the one at `place`, from 0, in the order in which it takes them."""
    epoch, position = divmod(place, num_examples)
    return int(_permutation(num_examples, seed, epoch)[position])


@functools.lru_cache(maxsize=2)  # the epoch that ends in a step and the one that begins
def _permutation(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # torch seeds its CPU generator with the low 32 bits: the epoch must be mixed in, not put above the seed.
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    order: NDArray[np.int64] = torch.randperm(num_examples, generator=torch.Generator().manual_seed(mixed)).numpy()
    return order


class BatchFeed:
    """Gives the micro-batches of each step; on a GPU a thread makes those of the next one, in pinned memory.

    On the CPU, where a thread would take time from the run itself, they are made when they are asked for.
    """

    def __init__(self, make: Callable[[int], StepBatches], *, ahead: bool) -> None:
        """Give what `make` returns for a step, a pure function of it; `ahead`: let a thread do so."""
        self._make = make
        self._pool = ThreadPoolExecutor(1, "batches") if ahead else None
        self._next: tuple[int, Future[StepBatches]] | None = None

    def take(self, step: int) -> StepBatches:
        """Return the micro-batches of `step`, and begin with those of the one after it."""
        if self._pool is None:
            return self._make(step)
        coming, self._next = self._next, None
        found = coming[1].result() if coming is not None and coming[0] == step else self._pinned(step)
        self._next = (step + 1, self._pool.submit(self._pinned, step + 1))
        return found

    def _pinned(self, step: int) -> StepBatches:
        return self._make(step).pinned()
