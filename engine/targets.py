"""Which weights a spec's `targets` mean, by name and shape alone. Planner and training ask the same function."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from engine.errors import TargetsError

Shape = tuple[int, ...]

# Linear layers of the attention under the names that model families give them, fused ones included.
_ATTENTION_LAYERS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack")
)
_NOT_LINEAR = ("norm", "embed", "ln_", "wte", "wpe", "bias", "conv", "rotary")
_EXAMPLES = 4  # real names shown where nothing matched


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
    if any(word in part for part in parts for word in _NOT_LINEAR):
        return False
    return len(shape) == 2 or (len(shape) == 3 and stacked)


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
    return repr(targets) if isinstance(targets, str) else ", ".join(repr(pattern) for pattern in targets)


def _remedy(shapes: Mapping[str, Shape]) -> str:
    linear = [name for name, shape in shapes.items() if is_linear(name, shape)]
    examples = ", ".join((linear or list(shapes))[:_EXAMPLES])
    return f"Its parameters are named like {examples}."
