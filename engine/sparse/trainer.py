"""Sparse tuning inside transformers' Trainer, or any loop that calls an optimizer's `step`.

tuning = attach(model, spec)
optimizer = TuningOptimizer(tuning, total_steps=100)
Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[MicroSteps(tuning)]).train()
tuning.delta().save(folder)
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.sparse.attach import SparseTuning
from engine.sparse.optim import clip_gradient
from engine.sparse.optimizers import build_optimizer
from engine.spec_rules import selects_in


class TuningOptimizer(torch.optim.Optimizer):
    """The optimizer of a tuning whose `step` also clips, writes the values back and reselects.

    Clipping is here because Trainer clips the parameters of the model, and the values are none. `zero_grad` is part of
    `step` for the same reason. The parameter groups are those of the inner optimizer, so schedulers work on them.
    """

    def __init__(self, tuning: SparseTuning, total_steps: int) -> None:
        """Begin the selection that the method needs.

        Args:
            tuning: of `attach`, freshly made.
            total_steps: optimizer steps of the whole run; SpIEL's schedule needs them.
        """
        spec = tuning.spec
        self._tuning = tuning
        self._inner = build_optimizer(tuning.entries, spec)
        self._step = 0
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state
        tuning.begin_reselection(self._inner, total_steps)
        self._begin_step()

    def _begin_step(self) -> None:
        self._step += 1
        spec = self._tuning.spec
        if selects_in(self._step, spec):
            self._tuning.begin_selection(spec.selection_micro_steps or spec.gradient_accumulation)
        if self._tuning.spiel is not None:
            self._tuning.spiel.begin_step(self._step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Close the last micro-step, update the values, write them into the weights, reselect where it is time."""
        assert closure is None, "closures are not supported"
        tuning = self._tuning
        tuning.end_micro_step()
        if tuning.selecting:  # Fisher, or more batches than a step has: this step only chose
            return
        _, clip = clip_gradient(tuning.values, tuning.spec.max_grad_norm)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        tuning.write_back()
        if tuning.spiel is not None:
            tuning.spiel.end_step(self._step, clip)
        self._begin_step()


class MicroSteps(TrainerCallback):
    """Tells a tuning where a micro-batch ends that is not the last one of its step."""

    def __init__(self, tuning: SparseTuning) -> None:
        """Report to `tuning`."""
        self._tuning = tuning

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_options: Any
    ) -> None:
        """Called by Trainer after the backward of a micro-batch."""
        self._tuning.end_micro_step()
