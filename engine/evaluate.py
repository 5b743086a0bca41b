"""The loss per labelled token or row, and held-out figures of causal models: answers compared word for word."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.chunked_loss import OutputLayer, chunked_causal_loss
from engine.data.batches import Batch, Question
from engine.data.moving import KnownMask, to_device
from engine.data.token_ids import padding_id, rows_of
from engine.events import Sample

ANSWER_TOKENS = 96  # an answer that is longer than this is cut, and then counts as wrong
ANSWER_BATCH_TOKENS = 2048  # prompts and answers generated together: 1 GiB of keys and values at 7B in bf16


def causal_loss(
    model: nn.Module, batch: Batch, labelled_tokens: int, device: torch.device, chunks: OutputLayer | None = None
) -> Tensor:
    """Return the cross-entropy summed over the labelled tokens of `batch` and divided by `labelled_tokens`.

    Dividing by the labelled tokens of the whole optimizer step makes one backward of 8 rows and 8 backwards of one
    row the same step, whatever their lengths.

    Args:
        model: returns `.logits`, (rows, length, vocabulary).
        batch: labels unshifted, -100 where nothing is predicted.
        labelled_tokens: the divisor, at least 1.
        device: where the model is.
        chunks: the output layer, where the loss is to be computed in chunks of tokens.
    """
    if chunks is not None:
        return chunked_causal_loss(model, chunks, batch, labelled_tokens, device)
    input_ids, labels = (to_device(tensor, device) for tensor in (batch.input_ids, batch.labels))
    logits = model(input_ids=input_ids, attention_mask=KnownMask.of(batch.attention_mask, device)).logits
    logits = logits[:, :-1].flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss / labelled_tokens


def classify(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the logits of a classifier, (rows, labels); of a regression (rows, 1)."""
    inputs = {"input_ids": to_device(batch.input_ids, device)}
    if batch.segments is not None:
        inputs["token_type_ids"] = to_device(batch.segments, device)
    logits: Tensor = model(**inputs, attention_mask=KnownMask.of(batch.attention_mask, device)).logits
    return logits


def classification_loss(logits: Tensor, labels: Tensor, rows: int) -> Tensor:
    """Return the cross-entropy, or of a regression the squared error, summed over rows and divided by `rows`.

    Args:
        logits: (rows, labels); (rows, 1) of a regression.
        labels: (rows,) class numbers, or numbers.
        rows: the divisor: those of the whole optimizer step.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if logits.shape[-1] == 1:
        return functional.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="sum") / rows
    return functional.cross_entropy(logits, labels.long(), reduction="sum") / rows


def batch_loss(
    model: nn.Module, batch: Batch, labelled: int, device: torch.device, chunks: OutputLayer | None = None
) -> Tensor:
    """Return the loss of a micro-batch, causal or of a classification, divided by `labelled` tokens or rows."""
    if batch.labels.dim() == 1:
        return classification_loss(classify(model, batch, device), to_device(batch.labels, device), labelled)
    return causal_loss(model, batch, labelled, device, chunks)


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
    chunks: OutputLayer | None = None,
) -> float:
    """Return the mean loss over all labelled tokens of `batches`; NaN where there are none."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        if interrupted():
            break
        total += float(causal_loss(model, batch, 1, device, chunks))
        tokens += batch.labelled_tokens
    model.train(was_training)
    return total / tokens if tokens else float("nan")


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Return the greedy answer to each question, in order; fewer where `interrupted` said to stop.

    Questions are answered in batches of similar length, padded on the left.
    """
    was_training = model.training
    model.eval()
    answers: dict[int, str] = {}
    # Longest first: a batch that is too large for the device fails at once.
    order = sorted(range(len(questions)), key=lambda number: -len(questions[number].prompt_ids))
    while order and not interrupted():
        longest = len(questions[order[0]].prompt_ids) + ANSWER_TOKENS
        rows = max(1, ANSWER_BATCH_TOKENS // longest)
        chosen, order = order[:rows], order[rows:]
        texts = _generate(model, tokenizer, [questions[number].prompt_ids for number in chosen])
        answers.update(zip(chosen, texts, strict=True))
    model.train(was_training)
    return [
        Sample(question.question, question.expected, answers[number])
        for number, question in enumerate(questions)
        if number in answers
    ]


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    pad = padding_id(tokenizer, rows_of(model))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    room = (getattr(model.config, "max_position_embeddings", None) or sys.maxsize) - longest
    most = max(1, min(ANSWER_TOKENS, room))
    generate: Any = model.generate
    out = generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=pad, use_cache=True)
    return [text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]


def exact_match(samples: Sequence[Sample]) -> float | None:
    """Return the share of answers that equal what was expected, both stripped; None without samples."""
    if not samples:
        return None
    return sum(sample.answer.strip() == sample.expected.strip() for sample in samples) / len(samples)
