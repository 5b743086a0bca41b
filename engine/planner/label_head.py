"""What classifies the first token of an encoder, as operations on a tape. Bytes.

The head's own weights are trained dense in fp32 beside any method (`engine.train.head`): their whole gradient stays.
"""

from engine.planner.activations import FP32_BYTES, Setting
from engine.planner.blocks import Segment, Weights
from engine.planner.operations import LinearWeight, Operations
from engine.planner.shape import ModelShape
from engine.planner.tape import Value, Weight


def head_gradient(numel: int, element_bytes: int, first: bool) -> Weight:
    """Return what the gradient of a weight that is trained dense takes: of 16-bit weights their fp32 masters have it.

    Args:
        numel: entries.
        element_bytes: of the base.
        first: whether the backward finds no gradients and leaves its own.
    """
    left = FP32_BYTES * numel if first else 0
    return Weight(element_bytes * numel, 0 if element_bytes == FP32_BYTES else FP32_BYTES * numel, left)


def label_segment(shape: ModelShape, setting: Setting, weights: Weights, entered: bool, first: bool) -> Segment:
    """Return what the layers over the first token of each row keep and take, R rows, h hidden.

    BERT: labels(dropout(tanh(pooler(x)))), where the pooler is part of the base. DistilBERT: with a layer of its own
    and relu. RoBERTa: with that, tanh, and dropout before it. What reads x itself, a view, keeps the whole last state.

    Args:
        shape: of the classifier.
        setting: of the micro-batch.
        weights: of the base that are trained here: `pooler`.
        entered: whether the gradient goes on into the last state.
        first: whether the backward finds no gradients and leaves its own.
    """
    head, layout = _LabelHead(setting, {}), shape.layout
    tape, hidden, trained = head.tape, shape.hidden, dict(weights)
    x = head.input(hidden, wanted=entered, outside=False)
    (y,) = tape.split(x, (head.e * setting.rows * hidden,))
    if layout.label_head == "roberta":
        y = head.dropout(y, layout.label_dropout)
    own = head_gradient(hidden * hidden, head.e, first)
    dense = trained.get("pooler", LinearWeight(0)) if layout.label_head == "bert" else LinearWeight(0, trained=own)
    y = head.rows_linear(y, hidden, dense)
    y = tape.op(y.num_bytes, [y], keeps_result=True)
    y = head.dropout(y, layout.label_dropout)
    labels = head_gradient(hidden * shape.vocabulary, head.e, first)
    y = head.rows_linear(y, shape.vocabulary, LinearWeight(0, trained=labels))
    return Segment(tape.saved_bytes, tape.forward_peak, tape.backward(y))


class _LabelHead(Operations):
    """Writes the head, whose layers see one token a row."""

    def rows_linear(self, x: Value, outputs: int, weight: LinearWeight) -> Value:
        """As `linear`, of (rows, inputs)."""
        keeps = [x] if weight.trained is not None else []
        return self.tape.op(self.e * self.setting.rows * outputs, [x], keeps, weight=weight.trained)
