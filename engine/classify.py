"""What a classifier says of held-out rows: the loss, the figures, and some rows with label and probability."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.batches import Batch
from engine.data.classification import encode_texts
from engine.data.labels import LabelledText, Labels
from engine.data.token_ids import require_rows, rows_of
from engine.errors import EngineError
from engine.evaluate import classification_loss, classify
from engine.events import Sample
from engine.metrics import classification_metrics, regression_metrics


@dataclass(frozen=True)
class Classified:
    """Held-out figures: mean loss a row, metrics by name (`engine.metrics`), and some rows as they were answered."""

    loss: float
    metrics: dict[str, float]
    samples: tuple[Sample, ...]


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Labels,
    texts: Sequence[LabelledText],
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> Classified:
    """Return the figures over all rows of `batches`; NaN and none where there are no rows.

    Args:
        model: a classifier.
        batches: of held-out rows.
        labels: of the dataset.
        texts: the first rows as texts: those that are shown.
        device: where the model is.
        interrupted: asked before each batch.
    """
    was_training = model.training
    model.eval()
    total, outputs, expected = 0.0, list[Tensor](), list[Tensor]()
    for batch in batches:
        if interrupted():
            break
        logits = classify(model, batch, device)
        total += float(classification_loss(logits, batch.labels.to(device), 1))
        outputs.append(logits.float().cpu())
        expected.append(batch.labels)
    model.train(was_training)
    if not outputs:
        return Classified(float("nan"), {}, ())
    logits, true = torch.cat(outputs), torch.cat(expected)
    shown = zip(texts, logits, strict=False)
    samples = tuple(Sample(text.line, text.word, answer_words(row, labels, most=1)) for text, row in shown)
    return Classified(total / len(true), _metrics(logits, true, labels), samples)


def _metrics(logits: Tensor, expected: Tensor, labels: Labels) -> dict[str, float]:
    if not labels.names:
        return regression_metrics(logits[:, 0].double().numpy(), expected.numpy())
    return classification_metrics(logits.argmax(-1).numpy(), expected.long().numpy(), len(labels.names))


def answer_words(logits: Tensor, labels: Labels, most: int = 10) -> str:
    """Return what a classifier says of one row: labels with their probability, likeliest first, or the number.

    Args:
        logits: (labels,) or, of a regression, (1,).
        labels: of the dataset.
        most: labels named.
    """
    if not labels.names:
        return labels.word_of(float(logits[0]))
    shares = logits.float().softmax(-1)
    order = shares.argsort(descending=True)[:most].tolist()
    return "\n".join(f"{labels.names[place]} {100 * float(shares[place]):.1f} %" for place in order)


@torch.no_grad()
def classify_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str | None],
    sequence_length: int,
) -> Tensor:
    """Return the logits, (labels,), of one text or a pair.

    Raises:
        EngineError: there is no text, or the model lacks a token of it.
    """
    if not texts[0] or texts[1] == "":
        raise EngineError("There is no text to classify. Write one, or two with ||| between them.")
    encoded = encode_texts([texts], tokenizer, sequence_length)[0]
    require_rows(max(encoded.input_ids, default=-1), rows_of(model), str(model.name_or_path))
    ids = torch.tensor([encoded.input_ids])
    segments = torch.tensor([encoded.segments]) if encoded.segments else None
    batch = Batch(ids, torch.zeros(1), torch.ones_like(ids), 1, segments)
    return classify(model.eval(), batch, model.device)[0]
