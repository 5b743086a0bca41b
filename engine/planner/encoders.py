"""Classifiers as the planner sees them: the tensors of BERT, RoBERTa and DistilBERT with a head, from the config alone.

A classification loads another class than the checkpoint's own: parts such as RoBERTa's pooler or the output layer over
the vocabulary are left out, and a head is made. The number of labels is known when the dataset is read; the plan counts
two, or what the config says.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]

ENCODERS = frozenset(("bert", "roberta", "xlm-roberta", "distilbert"))
LABELS = 2
# What transformers calls the layers behind the last block of a classifier.
HEAD_MODULES = (
    "classifier",
    "score",
    "pre_classifier",
    "classification_head",
    "head",
    "pooler",
    "sequence_summary",
    "logits_proj",
)
POSITIONS = 512  # where a config says none, as its class takes
_OUTPUTS = ("lm_head.", "embed_out.", "output.weight")  # over the vocabulary


def is_head(name: str) -> bool:
    """Return whether a parameter of a classifier is trained dense: what no checkpoint of the base holds."""
    return name.partition(".")[0] in HEAD_MODULES


def is_pooler(name: str) -> bool:
    """Return whether a parameter of the base is the weight between the blocks and the labels (BERT)."""
    return name.endswith("pooler.dense.weight")


def classifier_tensors(family: str, config: Mapping[str, Any], tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the parameters, name to shape, of the class that transformers loads for a classification.

    Args:
        family: the config's model_type.
        config: the content of config.json.
        tensors: of the base; read for families that are no encoder here.

    Raises:
        KeyError: the config of an encoder lacks a number; the message is its name.
    """
    if family == "distilbert":
        return dict(_distilbert(config))
    if family in ENCODERS:
        return dict(_bert(config, "bert" if family == "bert" else "roberta"))
    config = config.get("text_config") or config
    kept = {name: shape for name, shape in tensors.items() if not name.startswith(_OUTPUTS)}
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    return kept | {"score.weight": (labels_of(config), int(hidden or 0))}


def labels_of(config: Mapping[str, Any]) -> int:
    """Return the labels that a config names, or `LABELS`."""
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) and names else LABELS


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a number of config.json; KeyError with its name where it is none."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KeyError(name)
    return value


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _bert(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = _whole(config, "hidden_size"), _whole(config, "intermediate_size")
    positions = _whole(config, "max_position_embeddings", POSITIONS)
    yield f"{prefix}.embeddings.word_embeddings.weight", (_whole(config, "vocab_size"), hidden)
    yield f"{prefix}.embeddings.position_embeddings.weight", (positions, hidden)
    yield f"{prefix}.embeddings.token_type_embeddings.weight", (_whole(config, "type_vocab_size", 2), hidden)
    yield from _norm(f"{prefix}.embeddings.LayerNorm", hidden)
    for layer in range(_whole(config, "num_hidden_layers")):
        block = f"{prefix}.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{block}.attention.self.{name}", hidden, hidden)
        yield from _linear(f"{block}.attention.output.dense", hidden, hidden)
        yield from _norm(f"{block}.attention.output.LayerNorm", hidden)
        yield from _linear(f"{block}.intermediate.dense", ffn, hidden)
        yield from _linear(f"{block}.output.dense", hidden, ffn)
        yield from _norm(f"{block}.output.LayerNorm", hidden)
    if prefix == "bert":
        yield from _linear("bert.pooler.dense", hidden, hidden)
        yield from _linear("classifier", labels_of(config), hidden)
    else:
        yield from _linear("classifier.dense", hidden, hidden)
        yield from _linear("classifier.out_proj", labels_of(config), hidden)


def _distilbert(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = _whole(config, "dim"), _whole(config, "hidden_dim")
    positions = _whole(config, "max_position_embeddings", POSITIONS)
    yield "distilbert.embeddings.word_embeddings.weight", (_whole(config, "vocab_size"), hidden)
    yield "distilbert.embeddings.position_embeddings.weight", (positions, hidden)
    yield from _norm("distilbert.embeddings.LayerNorm", hidden)
    for layer in range(_whole(config, "n_layers")):
        block = f"distilbert.transformer.layer.{layer}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from _linear(f"{block}.attention.{name}", hidden, hidden)
        yield from _norm(f"{block}.sa_layer_norm", hidden)
        yield from _linear(f"{block}.ffn.lin1", ffn, hidden)
        yield from _linear(f"{block}.ffn.lin2", hidden, ffn)
        yield from _norm(f"{block}.output_layer_norm", hidden)
    yield from _linear("pre_classifier", hidden, hidden)
    yield from _linear("classifier", labels_of(config), hidden)
