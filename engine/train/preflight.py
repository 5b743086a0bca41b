"""One step at the longest batch before the run, so that what will fail fails in the first minute.

The step is a whole one, by a tuning and an optimizer of its own that are thrown away afterwards: weights, random
numbers and all that the run begins with are as if it had not been. On a GPU one evaluation batch and one checkpoint
follow; on the CPU they would cost more time than they save.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.batches import PreparedData, evaluation_batches
from engine.data.classification import LabelledExamples
from engine.data.examples import Examples
from engine.errors import BudgetError, TrainingError
from engine.evaluate import batch_loss
from engine.events import Event, Preflighted
from engine.planner import formulas
from engine.planner.plan import Plan, make_plan
from engine.rng import random_state_kept
from engine.sparse.peers import ALONE, Peers
from engine.spec import RunSpec
from engine.spec_rules import optimizer_of
from engine.train.checkpoint import save_checkpoint
from engine.train.control import NeverAsked
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import Tuning
from engine.units import GIB, format_bytes

_MICRO_STEPS = 2  # of the step: sums over micro-batches take as much with two as with many
# The CPU's allocator; CUDA itself, Triton and NCCL, which have memory of their own; cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_LESS = 0.8  # of the planned peak: what has run out is to save at least the rest


@dataclass(frozen=True)
class Preflight:
    """What the step works with.

    `plan`: says what helps where it fails; `folder`: of the run, for the checkpoint; `start`: makes the model
    trainable; `peers`: the processes of the run, which all try it at once.
    """

    spec: RunSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    plan: Plan
    folder: Path
    start: Callable[[RunSpec], Tuning]
    peers: Peers = ALONE

    def run(self) -> Preflighted:
        """Do the step, and on a GPU an evaluation batch and a checkpoint; leave no trace of them.

        Raises:
            BudgetError: memory ran out; the sentence names what helps.
            TrainingError: the checkpoint cannot be written, or the loss is not finite.
        """
        device = next(self.model.parameters()).device
        started, meter = time.monotonic(), MemoryMeter(device)
        state = "step"
        with random_state_kept(device):
            try:
                trainer = self._trainer(meter)
                try:
                    self._step(trainer)
                    if device.type == "cuda":
                        state = "evaluation"
                        self._evaluate(trainer)
                        state = "checkpoint"
                        self._checkpoint(trainer)
                finally:
                    trainer.optimizer.zero_grad(set_to_none=True)
                    trainer.tuning.detach()
                    self.model.eval()  # as it was loaded
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise BudgetError(self._out_of_memory(state)) from error
        rows, length = self.spec.micro_batch_size, self.data.row_lengths.longest
        return Preflighted(rows, length, meter.peak_bytes(), time.monotonic() - started)

    def _trainer(self, meter: MemoryMeter) -> Trainer:
        spec = self.spec
        changes = {"max_steps": 1, "gradient_accumulation": min(_MICRO_STEPS, spec.gradient_accumulation)}
        if spec.selection_micro_steps is not None:
            changes["selection_micro_steps"] = min(_MICRO_STEPS * self.peers.count, spec.selection_micro_steps)
        small = spec.model_copy(update=changes)
        count = small.micro_batch_size * small.gradient_accumulation
        data = replace(self.data, training=longest_rows(self.data.training, count))
        tuning = self.start(small)
        optimizer = tuning.make_optimizer()
        return Trainer(
            small,
            self.model,
            self.tokenizer,
            data,
            tuning,
            optimizer,
            _ignore,
            NeverAsked(),
            lambda _: None,
            meter,
            self.peers,
        )

    def _step(self, trainer: Trainer) -> None:
        if self.spec.method != "full":
            trainer.run()
            return
        # The values of full are the weights themselves: no update, but room for what it would keep.
        states = formulas.OPTIMIZERS[optimizer_of(self.spec)][0]
        room = [torch.empty_like(values) for values in trainer.tuning.values for _ in range(states)]
        trainer.rehearse()
        del room

    def _evaluate(self, trainer: Trainer) -> None:
        rows = longest_rows(self.data.evaluation, self.spec.micro_batch_size)
        if len(rows):
            with torch.no_grad():
                for batch in evaluation_batches(rows, self.spec):
                    batch_loss(self.model, batch, 1, trainer.device, trainer.chunks)

    def _checkpoint(self, trainer: Trainer) -> None:
        if not self.peers.is_first:
            return
        folder = self.folder / ".preflight"
        try:
            save_checkpoint(folder, trainer.tuning, trainer.optimizer, trainer.progress())
        except OSError as error:
            raise TrainingError(
                f"A checkpoint cannot be written to {str(self.folder)!r} ({error.strerror}). Free space, or give "
                "another output folder."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _out_of_memory(self, state: str) -> str:
        lengths, planned = self.data.row_lengths, self.plan.peak_bytes
        less = self.spec.model_copy(update={"budget_gib": _LESS * planned / GIB})
        remedies = make_plan(less, lengths=lengths).remedies
        helps = " or ".join(remedy.title for remedy in remedies[:2]) or "choose a smaller model"
        tried = f"{self.spec.micro_batch_size} x {lengths.longest:,} tokens"
        return (
            f"Memory ran out in the {state} of {tried} that was tried before the run; "
            f"about {format_bytes(planned)} were planned. What helps: {helps}."
        )


def _ignore(_event: Event) -> None:
    """Take an event that is not the run's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: in PyTorch's allocators, or on a GPU in what lies beside them."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def longest_rows(examples: Examples | LabelledExamples, count: int) -> Examples | LabelledExamples:
    """Return the `count` longest examples, the longest first; fewer where there are fewer."""
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda place: -lengths[place])[:count]
    if isinstance(examples, LabelledExamples):
        return LabelledExamples([examples[place] for place in order], examples.pad_id)
    return Examples([examples[place] for place in order], examples.pad_id)
