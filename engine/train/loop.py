"""The training loop: one optimizer step after another, with evaluation, probes and checkpoints in between.

The loop owns no files: it says what happens through `emit` and asks `Control` what is wanted of it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.chunked_loss import output_layer
from engine.data.batches import Batch, PreparedData
from engine.data.steps import BatchFeed, StepBatches, steps_in_run, take_step
from engine.errors import TrainingError
from engine.evaluate import batch_loss
from engine.events import Evaluated, Event, Warned
from engine.models import resolve_dtype
from engine.sparse.attach import SparseTuning
from engine.sparse.optim import clip_gradient
from engine.sparse.peers import ALONE, Peers
from engine.sparse.probe import GradientProbe
from engine.sparse.recompute import kept_by_model
from engine.spec import BASELINES, RunSpec
from engine.spec_rules import selects_in
from engine.train.checkpoint import Progress
from engine.train.checkpointing import checkpoint_blocks
from engine.train.choosing import choose_entries
from engine.train.control import Control
from engine.train.examiner import SHOWN_SAMPLES, Examiner
from engine.train.exchange import exchange_gradients
from engine.train.figures import (
    StepFigures,
    StepLog,
    probed,
    read_figures,
    require_finite,
    require_finite_loss,
    selected,
)
from engine.train.head import HeadedTuning
from engine.train.memory import MemoryMeter
from engine.train.rates import learning_rate_at
from engine.train.tuning import Tuning

MOST_BACK_OFFS = 24  # halvings of the loss scale in one step: 2**16 down to nothing that fp16 can tell apart


@dataclass
class Trainer:
    """One run in progress: what it works with and how far it is.

    `step` optimizer steps are done; `elapsed_s` seconds were spent in `run`, over all sessions of the run. With `peers`
    every process has a trainer of its own, and only the first one's control is asked and only it evaluates.
    """

    spec: RunSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    tuning: Tuning
    optimizer: torch.optim.Optimizer
    emit: Callable[[Event], None]
    control: Control
    save: Callable[["Trainer"], None]
    memory: MemoryMeter
    peers: Peers = ALONE
    step: int = 0
    elapsed_s: float = 0.0
    scaler: torch.amp.GradScaler = field(init=False)
    """Of the loss, so that gradients in float16 do not underflow; idle over other types."""

    def __post_init__(self) -> None:
        """Prepare the model for training."""
        self.device = next(self.model.parameters()).device
        tuning = self.tuning.inner if isinstance(self.tuning, HeadedTuning) else self.tuning
        self.sparse = tuning if isinstance(tuning, SparseTuning) else None
        self.total_steps = steps_in_run(len(self.data.training), self.spec)
        self.model.config.use_cache = False
        half = resolve_dtype(self.spec.dtype, self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.log = StepLog(self.spec, self.total_steps, self.emit, self.peers)
        self._feed = BatchFeed(
            lambda step: take_step(self.data.training, self.spec, step, self.peers.rank),
            ahead=self.device.type == "cuda",
        )
        if self.sparse is not None:
            self.sparse.join(self.peers)
        self.tuning.begin_reselection(self.optimizer, self.total_steps)
        chunked = self.spec.chunked_loss and self.data.labels is None
        self.chunks = output_layer(self.model) if chunked else None
        if self.spec.chunked_loss and self.chunks is None:
            self.emit(Warned("The loss in chunks is not known for this model; the loss is computed in one piece."))
        self._examiner = Examiner(
            self.spec, self.model, self.tokenizer, self.data, self.device, self.chunks, self.control.stop_requested
        )
        checkpoint_blocks(self.model, self.spec)
        lean = any(each.lean for each in kept_by_model(self.spec, self.model))
        if self.spec.recompute in ("elementwise", "mlp") and not lean:
            self.emit(Warned("How blocks of this model could keep less is not known; they keep all that they make."))

    def run(self) -> bool:
        """Train from the step after `self.step` to the last one.

        Returns:
            Whether the run went to its end; False where it was stopped.

        Raises:
            TrainingError: a loss or a gradient is not finite.
        """
        self.model.train()
        self.log.begin_session(self.step, self.elapsed_s)
        while self.step < self.total_steps:
            saves = self.step > 0 and self.control.checkpoint_requested()
            stop, save = self.peers.totals([self.control.stop_requested(), saves])
            if stop:
                break
            if save:
                self.settle()
                self.save(self)
            self.log.begin_step()
            self.log.add(self._optimizer_step(self.step + 1))
            self.step += 1
            if self.step % self.spec.logging_interval == 0:
                self.log.read()
            self._between_steps()
        self.settle()
        return self.step == self.total_steps

    def settle(self) -> None:
        """Read and report what steps have left unread.

        Raises:
            TrainingError: a loss or a gradient was not finite.
        """
        self.log.read()
        self.elapsed_s = self.log.elapsed_s

    def rehearse(self) -> None:
        """Do the backwards of the first step and no update; gradients and what was chosen by them stay behind."""
        self.model.train()
        self._gradient(1, self._feed.take(1))
        exchange_gradients(self.tuning, self.peers)

    def _between_steps(self) -> None:
        last = self.step == self.total_steps
        if _due(self.step, self.spec.evaluation_interval) and not last:
            self.settle()
            if self.peers.is_first:
                self.evaluate(answers=SHOWN_SAMPLES if self.data.questions else 0, scored=False)
        if _due(self.step, self.spec.checkpoint_interval) and not last:
            self.settle()
            self.save(self)

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        while True:
            yield from take_step(self.data.training, self.spec, step, self.peers.rank).batches
            step += 1

    def _optimizer_step(self, step: int) -> StepFigures:
        """Do step `step`, from 1; where it chooses nothing and is not in float16, nobody here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.total_steps, self.spec)
        rows = self._feed.take(step)
        for _ in range(MOST_BACK_OFFS):
            losses = self._gradient(step, rows)
            exchange_gradients(self.tuning, self.peers)
            scale = self.scaler.get_scale()
            self.scaler.unscale_(self.optimizer)
            norm, clip = clip_gradient(self.tuning.values, self.spec.max_grad_norm)
            figures = self._figures(step, rows, losses, _unless(self.tuning.finite(), norm))
            if not self._overflowed(figures):
                break
            self._back_off()
        else:
            raise TrainingError(
                f"The gradient of step {step} is too large for float16 at any scale. Set dtype=float32."
            )
        if looks := self._looks_in(step):
            self.log.read()
            ((loss, size),) = read_figures([figures], self.peers)
            require_finite(step, loss, size, self.spec)
            self._report_choice(step)
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.tuning.write_back()
        if self.sparse is not None:
            if self.sparse.spiel is not None and (done := self.sparse.spiel.end_step(step, clip / scale)):
                self.emit(selected(step, self.sparse, done.replaced))
            if looks:
                self.sparse.plan_gradients()
        return figures

    def _figures(self, step: int, rows: StepBatches, losses: list[Tensor], norm: Tensor) -> StepFigures:
        return StepFigures(
            step,
            tuple(losses),
            norm.to(self.device),  # of no gradient at all, it is in main memory
            learning_rate_at(step, self.total_steps, self.spec),
            rows.tokens,
            self.memory.current_bytes(),
            self.memory.peak_bytes(),
        )

    def _looks_in(self, step: int) -> bool:
        """Return whether `step` looks at numbers anyway, so that it is not to work on broken ones."""
        spiel = self.tuning.spiel
        chooses = step == 1 or selects_in(step, self.spec) or (spiel is not None and spiel.chooses_in(step))
        return chooses or self._probe_due(step)

    def _gradient(self, step: int, rows: StepBatches) -> list[Tensor]:
        """Do the backwards of a step, and choose entries where it is time; return the loss of each micro-batch."""
        if self.tuning.spiel is not None:
            self.tuning.spiel.begin_step(step)
        if self.sparse is not None:
            choose_entries(self.sparse, step, rows.batches, self._micro_batches(step), self._backward, self.peers)
            self.optimizer.zero_grad(set_to_none=True)  # of a head that is trained dense, left by passes that choose
        losses = []
        for number, batch in enumerate(rows.batches, 1):
            if number == len(rows.batches) and self.peers.is_first and self._probe_due(step):
                self.tuning.probe = GradientProbe()
            losses.append(self._backward(batch, max(1, rows.labelled_tokens)))
        return losses

    def _overflowed(self, figures: StepFigures) -> bool:
        """Return whether the gradient in float16 is too large; of other types nobody asks here."""
        if not self.scaler.is_enabled():
            return False
        ((loss, norm),) = read_figures([figures], self.peers)
        require_finite_loss(figures.step, loss, self.spec)
        return not math.isfinite(norm)

    def _back_off(self) -> None:
        """Halve the scale of the loss for another try of the step, whose gradient overflowed."""
        self.scaler.update(self.scaler.get_scale() / 2)
        self.optimizer.zero_grad(set_to_none=True)
        self.tuning.probe = None

    def _backward(self, batch: Batch, labelled_tokens: int) -> Tensor:
        loss = batch_loss(self.model, batch, labelled_tokens, self.device, self.chunks)
        self.scaler.scale(loss).backward()
        self.tuning.end_micro_step()
        return loss.detach()

    def progress(self) -> Progress:
        """Return where the run stands, for a checkpoint."""
        scale = self.scaler.state_dict()
        return Progress(
            self.step,
            self.elapsed_s,
            self.memory.peak_bytes(),
            scale.get("scale", 1.0),
            scale.get("_growth_tracker", 0),
        )

    def go_on_from(self, progress: Progress) -> None:
        """Take up where the session before left off; values and states are in place already."""
        self.step, self.elapsed_s = progress.step, progress.elapsed_s
        self.memory = MemoryMeter(self.device, progress.peak_bytes)
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {**state, "scale": progress.loss_scale, "_growth_tracker": progress.steps_at_scale}
            )

    def _report_choice(self, step: int) -> None:
        probe, self.tuning.probe = self.tuning.probe, None
        if probe:
            self.emit(probed(step, probe))
        if self.sparse is not None and (step == 1 or selects_in(step, self.spec)):
            replaced = self.sparse.num_active if step == 1 else self.sparse.replaced
            self.emit(selected(step, self.sparse, replaced))

    def _probe_due(self, step: int) -> bool:
        interval = 0 if self.spec.method in BASELINES else self.spec.probe_interval
        # A step that chooses by its own gradient has nothing to compare it with; the first one that has is step 2.
        return interval > 0 and (step == 2 or step % interval == 0) and not self.tuning.selecting

    def evaluate(self, answers: int, *, scored: bool) -> Evaluated | None:
        """Compute, emit and return held-out figures, or None where a stop broke that off; see `Examiner.examine`."""
        figures = self._examiner.examine(self.step, answers, scored=scored)
        if figures is not None:
            self.emit(figures)
        return figures


def _unless(finite: Tensor | bool, norm: Tensor) -> Tensor:
    """Return `norm`, or NaN where something else of the gradient is not `finite`."""
    if isinstance(finite, Tensor):
        return torch.where(finite, norm, torch.nan)
    return norm if finite else torch.full_like(norm, torch.nan)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
