"""The training loop: one optimizer step after another, with evaluation, probes and checkpoints in between.

The loop owns no files: it says what happens through `emit` and asks `Control` what is wanted of it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.chunked_loss import output_layer
from engine.classify import evaluate_rows
from engine.data.batches import Batch, PreparedData, evaluation_batches, step_batches, steps_in_run
from engine.errors import TrainingError
from engine.evaluate import answer_questions, batch_loss, exact_match, heldout_loss
from engine.events import Evaluated, Event, Probed, Selected, Stepped, Warned
from engine.models import resolve_dtype
from engine.sparse.attach import SparseTuning
from engine.sparse.optim import clip_gradient
from engine.sparse.probe import GradientProbe
from engine.spec import BASELINES, RunSpec
from engine.spec_rules import selects_in
from engine.train.checkpoint import Progress
from engine.train.checkpointing import checkpoint_blocks
from engine.train.choosing import choose_entries
from engine.train.head import HeadedTuning
from engine.train.memory import MemoryMeter
from engine.train.tuning import Tuning

SHOWN_SAMPLES = 8  # answers an evaluation event carries
MOST_BACK_OFFS = 24  # halvings of the loss scale in one step: 2**16 down to nothing that fp16 can tell apart


class Control(Protocol):
    """What a person asks of a run while it runs."""

    def stop_requested(self) -> bool:
        """Return whether the run is to end after the step it is in."""

    def checkpoint_requested(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""


@dataclass
class Trainer:
    """One run in progress: what it works with and how far it is.

    `step` optimizer steps are done; `elapsed_s` seconds were spent in `run`, over all sessions of the run.
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
        self.tuning.begin_reselection(self.optimizer, self.total_steps)
        chunked = self.spec.chunked_loss and self.data.labels is None
        self.chunks = output_layer(self.model) if chunked else None
        if self.spec.chunked_loss and self.chunks is None:
            self.emit(Warned("The loss in chunks is not known for this model; the loss is computed in one piece."))
        checkpoint_blocks(self.model, self.spec)

    def run(self) -> bool:
        """Train from the step after `self.step` to the last one.

        Returns:
            Whether the run went to its end; False where it was stopped.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.model.train()
        started, before, first = time.monotonic(), self.elapsed_s, self.step
        while self.step < self.total_steps:
            if self.control.stop_requested():
                return False
            begun = time.monotonic()
            loss, norm, tokens = self._optimizer_step(self.step + 1)
            self.step += 1
            now = time.monotonic()
            self.elapsed_s = before + now - started
            remaining_s = (now - started) / (self.step - first) * (self.total_steps - self.step)
            self.emit(
                Stepped(
                    self.step,
                    self.total_steps,
                    loss,
                    learning_rate_at(self.step, self.total_steps, self.spec),
                    norm,
                    tokens / (now - begun),
                    self.memory.current_bytes(),
                    self.memory.peak_bytes(),
                    self.elapsed_s,
                    remaining_s,
                )
            )
            self._between_steps()
            self.elapsed_s = before + time.monotonic() - started
        return True

    def rehearse(self) -> None:
        """Do the backwards of the first step and no update; gradients and what was chosen by them stay behind."""
        self.model.train()
        self._gradient(1, step_batches(self.data.training, self.spec, 1))

    def _between_steps(self) -> None:
        last = self.step == self.total_steps
        if _due(self.step, self.spec.evaluation_interval) and not last:
            self.evaluate(answers=SHOWN_SAMPLES if self.data.questions else 0, scored=False)
        if self.control.checkpoint_requested() or (_due(self.step, self.spec.checkpoint_interval) and not last):
            self.save(self)

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        while True:
            yield from step_batches(self.data.training, self.spec, step)
            step += 1

    def _optimizer_step(self, step: int) -> tuple[float, float, int]:
        """Do step `step`, from 1; return its loss, the gradient's norm before clipping, and its tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.total_steps, self.spec)
        batches = step_batches(self.data.training, self.spec, step)
        for _ in range(MOST_BACK_OFFS):
            loss = self._gradient(step, batches)
            scale = self.scaler.get_scale()
            self.scaler.unscale_(self.optimizer)
            norm, clip = clip_gradient(self.tuning.values, self.spec.max_grad_norm)
            if math.isfinite(norm) and self.tuning.finite():
                break
            self._back_off(step, norm)
        else:
            raise TrainingError(
                f"The gradient of step {step} is too large for float16 at any scale. Set dtype=float32."
            )
        self._report_probe(step)
        if self.sparse is not None and (step == 1 or selects_in(step, self.spec)):
            self._report_selection(step, self.sparse.num_active if step == 1 else self.sparse.replaced)
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.tuning.write_back()
        if self.tuning.spiel is not None and (done := self.tuning.spiel.end_step(step, clip / scale)):
            self._report_selection(step, done.replaced)
        return loss, norm, sum(int(batch.attention_mask.sum()) for batch in batches)

    def _gradient(self, step: int, batches: list[Batch]) -> float:
        """Do the backwards of a step, and choose entries where it is time; return the loss."""
        if self.tuning.spiel is not None:
            self.tuning.spiel.begin_step(step)
        if self.sparse is not None:
            choose_entries(self.sparse, step, batches, self._micro_batches(step), self._backward)
            self.optimizer.zero_grad(set_to_none=True)  # of a head that is trained dense, left by passes that choose
        labelled = sum(batch.labelled_tokens for batch in batches)
        loss = 0.0
        for number, batch in enumerate(batches, 1):
            if number == len(batches) and self._probe_due(step):
                self.tuning.probe = GradientProbe()
            loss += self._backward(batch, max(1, labelled))
        return loss

    def _back_off(self, step: int, norm: float) -> None:
        """Halve the scale of the loss for another try of the step, whose gradient overflowed."""
        if not self.scaler.is_enabled():
            raise TrainingError(
                f"The gradient became {norm} in step {step}. Lower learning_rate (now "
                f"{self.spec.learning_rate:g}), or set dtype=float32."
            )
        self.scaler.update(self.scaler.get_scale() / 2)
        self.optimizer.zero_grad(set_to_none=True)
        self.tuning.probe = None

    def _backward(self, batch: Batch, labelled_tokens: int) -> float:
        loss = batch_loss(self.model, batch, labelled_tokens, self.device, self.chunks)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss became {value} after step {self.step}. Lower learning_rate (now "
                f"{self.spec.learning_rate:g}), or set dtype=float32."
            )
        self.scaler.scale(loss).backward()
        self.tuning.end_micro_step()
        return value

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

    def _report_selection(self, step: int, replaced: int) -> None:
        density = self.tuning.num_active / self.tuning.target_numel
        share = self.tuning.gradient_share if isinstance(self.tuning, SparseTuning) else None
        self.emit(Selected(step, self.spec.method, self.tuning.num_active, density, replaced, share))

    def _probe_due(self, step: int) -> bool:
        interval = 0 if self.spec.method in BASELINES else self.spec.probe_interval
        # A step that chooses by its own gradient has nothing to compare it with; the first one that has is step 2.
        return interval > 0 and (step == 2 or step % interval == 0) and not self.tuning.selecting

    def _report_probe(self, step: int) -> None:
        probe, self.tuning.probe = self.tuning.probe, None
        if not probe:
            return
        shares = probe.overall
        tensors = {name: (item.top, item.selected, item.best) for name, item in probe.tensors.items()}
        self.emit(Probed(step, shares.top, shares.selected, shares.best, tensors))

    def evaluate(self, answers: int, *, scored: bool) -> Evaluated | None:
        """Compute the held-out loss, answer up to `answers` held-out questions, emit and return the figures.

        Of a classification, compute its metrics instead of answering.

        A stop breaks the evaluation off: None is returned and nothing is emitted, since half of it says nothing.

        Args:
            answers: held-out questions to answer.
            scored: whether the answers make an exact-match figure, or are shown only.
        """
        stop = self.control.stop_requested
        batches = evaluation_batches(self.data.evaluation[: self.spec.evaluation_rows], self.spec)
        if self.data.labels is not None:
            texts = self.data.texts[:SHOWN_SAMPLES]
            found = evaluate_rows(self.model, batches, self.data.labels, texts, self.device, stop)
            return self._report(Evaluated(self.step, found.loss, None, found.samples, found.metrics))
        loss = heldout_loss(self.model, batches, self.device, stop, self.chunks)
        samples = answer_questions(self.model, self.tokenizer, self.data.questions[:answers], stop)
        share = exact_match(samples) if scored else None
        return self._report(Evaluated(self.step, loss, share, tuple(samples[:SHOWN_SAMPLES])))

    def _report(self, figures: Evaluated) -> Evaluated | None:
        """Emit and return the figures of an evaluation, but None where a stop broke it off."""
        if self.control.stop_requested():
            return None
        self.emit(figures)
        return figures


def learning_rate_at(step: int, total_steps: int, spec: RunSpec) -> float:
    """Return the learning rate of optimizer step `step`, from 1: a linear rise, then the schedule down to zero."""
    warmup = round(spec.warmup_fraction * total_steps)
    if step <= warmup:
        return spec.learning_rate * step / warmup
    if spec.lr_schedule == "constant":
        return spec.learning_rate
    # The step after the last one would have a rate of zero.
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if spec.lr_schedule == "cosine":
        return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate * (1 - done)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
