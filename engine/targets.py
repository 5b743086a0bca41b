"""Which weights a spec's `targets` mean, by name and shape alone. Planner and training ask the same function."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from engine.errors import TargetsError

Shape = tuple[int, ...]

# Linear layers of the attention under the names that model families give them, fused ones included.
_ATTENTION_LAYERS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack")
)
_NOT_LINEAR = ("norm", "embed", "ln_", "wte", "wpe", "bias", "conv", "rotary")
_IA3_LAYERS = frozenset(
    ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack", "key", "value", "k_lin", "v_lin")
)
_LAST_OF_MLP = frozenset(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "lin2"))
_ROUTERS = frozenset(("gate", "router"))
_EXAMPLES = 4  # real names shown where nothing matched
PERMUTED_NUMEL = 2**20  # a permutation of so many takes milliseconds
MOST_DRAWN = 1 / 8  # of a larger share so many draws repeat that a permutation is as fast


def match_targets(shapes: Mapping[str, Shape], targets: str | tuple[str, ...]) -> list[str]:
    """Return the names that `targets` mean, in the order of `shapes`.

    Args:
        shapes: parameter name to shape; tied weights once.
        targets: `attention` (q, k, v, o, also fused), `linear` (all linear weights of the blocks, experts and router
            gates included), `all`, or patterns: one dotted part of a name (q_proj), or a glob on the whole name.

    Raises:
        TargetsError: nothing matches, or one of the patterns matches nothing.
    """
    if isinstance(targets, tuple):
        _require_each(shapes, targets)
    names = [name for name, shape in shapes.items() if _matches(name, shape, targets)]
    if not names:
        raise TargetsError(f"targets {_words(targets)} match no weight of this model. {_remedy(shapes)}")
    return names


def num_active_of(numels: Mapping[str, int], density: float, num_trainable: int | None = None) -> dict[str, int]:
    """Return how many entries of each target are trained: max(1, int(density * numel)).

    Args:
        numels: entries of each target.
        density: in (0, 1].
        num_trainable: entries over all targets, instead of density.
    """
    if num_trainable is not None:
        density = min(1.0, num_trainable / sum(numels.values()))
    return {name: max(1, int(density * numel)) for name, numel in numels.items()}


def is_drawn_singly(numel: int, count: int) -> bool:
    """Return whether `count` random positions of `numel` are drawn one by one, not as the head of a permutation."""
    return numel > PERMUTED_NUMEL and count <= MOST_DRAWN * numel


def layer_number(name: str) -> int | None:
    """Return the number of the block that a parameter belongs to; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_linear(name: str, shape: Shape) -> bool:
    """Return whether a parameter is the weight of a linear layer inside a numbered block.

    Expert weights that are stacked in one tensor (experts, in, out) count; norms, embeddings, biases and
    convolutions do not.
    """
    parts = name.split(".")
    stacked = "experts" in parts and parts[-1] != "weight"
    if layer_number(name) is None or parts[-1].endswith("bias") or not (stacked or parts[-1] == "weight"):
        return False
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    if any(word in part for part in parts[number:] for word in _NOT_LINEAR):
        return False
    return len(shape) == 2 or (len(shape) == 3 and stacked)


def is_linear_layer(name: str, shape: Shape) -> bool:
    """Return whether a parameter is the weight of a layer of its own inside a block: no stacked experts, no router."""
    return is_linear(name, shape) and len(shape) == 2 and _layer_of(name) not in _ROUTERS


def is_attention(name: str, shape: Shape) -> bool:
    """Return whether a parameter is the weight of a linear layer of the attention."""
    parts = name.split(".")
    inside = any("attn" in part or "attention" in part for part in parts)
    return is_linear(name, shape) and (inside or not _ATTENTION_LAYERS.isdisjoint(parts))


def _matches(name: str, shape: Shape, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, tuple):
        return any(_fits(name, pattern) for pattern in targets)
    if targets == "attention":
        return is_attention(name, shape)
    return targets == "all" or is_linear(name, shape)


def _fits(name: str, pattern: str) -> bool:
    return pattern in name.split(".") or fnmatchcase(name, pattern)


def _require_each(shapes: Mapping[str, Shape], patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in shapes):
            raise TargetsError(
                f"targets: the pattern {pattern!r} matches no parameter of this model. {_remedy(shapes)}"
            )


def _words(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(repr(pattern) for pattern in targets) or "[]"


def _remedy(shapes: Mapping[str, Shape]) -> str:
    linear = [name for name, shape in shapes.items() if is_linear(name, shape)]
    examples = ", ".join((linear or list(shapes))[:_EXAMPLES])
    return f"Its parameters are named like {examples}."


def adapted_weights(
    shapes: Mapping[str, Shape], targets: str | tuple[str, ...], method: Literal["lora", "ia3"]
) -> list[str]:
    """Return the weights of the linear layers that get an adapter, in the order of `shapes`.

    Those that `targets` mean and that are layers of the blocks; experts stacked in one tensor and router gates are no
    such layers. Of a word, ia3 takes what its paper scales (arXiv:2205.05638): keys, values, the input of the MLP's
    last layer; fused layers whole. Patterns are taken as they are.

    Raises:
        TargetsError: nothing is left.
    """
    chosen = []
    for name in match_targets(shapes, targets):
        layer = _layer_of(name)
        wanted = method == "lora" or isinstance(targets, tuple) or layer in _IA3_LAYERS or is_feedforward(name)
        if wanted and is_linear_layer(name, shapes[name]):
            chosen.append(name)
    if not chosen:
        raise TargetsError(
            f"targets {_words(targets)} hold no linear layer of the blocks for {method} to adapt. {_remedy(shapes)}"
        )
    return chosen


def is_feedforward(name: str) -> bool:
    """Return whether a weight is that of the MLP's last layer, whose input ia3 scales; of all others, the output."""
    attention = any("attn" in part or "attention" in part for part in name.split("."))
    of_bert = name.endswith(".output.dense.weight")
    return not attention and (of_bert or _layer_of(name) in _LAST_OF_MLP)


def adapter_numel(name: str, shape: Shape, method: Literal["lora", "ia3"], rank: int) -> int:
    """Return the entries of the adapter beside one layer.

    lora: rank (in + out), of two matrices. ia3: one factor for each output; of the MLP's last layer, for each input.

    Args:
        name: of the weight.
        shape: (out, in). GPT-2's layers (c_attn, c_fc, c_proj) are (in, out), but there the longer side is meant.
        method: lora or ia3.
        rank: of lora.
    """
    if method == "lora":
        return rank * sum(shape)
    if _layer_of(name).startswith("c_"):
        return max(shape)
    return shape[1] if is_feedforward(name) else shape[0]


def _layer_of(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
