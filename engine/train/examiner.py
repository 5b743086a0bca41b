"""Held-out figures of a run in progress: the loss, answers to questions, metrics of a classification."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.chunked_loss import OutputLayer
from engine.classify import evaluate_rows
from engine.data.batches import PreparedData, evaluation_batches
from engine.evaluate import answer_questions, exact_match, heldout_loss
from engine.events import Evaluated
from engine.spec import RunSpec

SHOWN_SAMPLES = 8  # answers an evaluation event carries


@dataclass(frozen=True)
class Examiner:
    """Computes the figures of `model` as it is; `stop` breaks that off, `chunks` is its output layer where known."""

    spec: RunSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    device: torch.device
    chunks: OutputLayer | None
    stop: Callable[[], bool]

    def examine(self, step: int, answers: int, *, scored: bool) -> Evaluated | None:
        """Return the figures after `step`; None where a stop broke it off, since half of them say nothing.

        Args:
            step: steps done.
            answers: held-out questions to answer; of a classification its metrics are computed instead.
            scored: whether the answers make an exact-match figure, or are shown only.
        """
        batches = evaluation_batches(self.data.evaluation[: self.spec.evaluation_rows], self.spec)
        if self.data.labels is not None:
            texts = self.data.texts[:SHOWN_SAMPLES]
            found = evaluate_rows(self.model, batches, self.data.labels, texts, self.device, self.stop)
            figures = Evaluated(step, found.loss, None, found.samples, found.metrics)
        else:
            loss = heldout_loss(self.model, batches, self.device, self.stop, self.chunks)
            samples = answer_questions(self.model, self.tokenizer, self.data.questions[:answers], self.stop)
            share = exact_match(samples) if scored else None
            figures = Evaluated(step, loss, share, tuple(samples[:SHOWN_SAMPLES]))
        return None if self.stop() else figures
