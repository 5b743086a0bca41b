"""What a forward keeps for its backward, and what the backward of one block or of the loss adds. Bytes.

The blocks are those of the Llama layout: RMSNorm, attention with rotary positions, RMSNorm, gated MLP. Symbols: T
tokens of a micro-batch (rows * length), s length, h hidden, f ffn, q = heads * head_dim, kv = kv_heads * head_dim, e
bytes per element of the base. Terms are read off what autograd saves: an operation keeps what its own backward needs,
and a tensor that several operations keep counts once. Every form was compared with a trace of the real model classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.planner.shape import ModelShape
from engine.targets import layer_number

Kernel = Literal["eager", "math", "flash", "efficient", "masked"]
FP32_BYTES = 4
# Flash attention's backward on CUDA works on 128 queries and rounds head sizes up to 32 (Dao-AILab/flash-attention).
FLASH_QUERIES, FLASH_HEAD = 128, 32


@dataclass(frozen=True)
class Setting:
    """One micro-batch: how many rows of how many tokens, in which element size, through which attention kernel."""

    rows: int
    length: int
    element_bytes: int
    kernel: Kernel
    checkpointing: bool

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class TrainedParts:
    """Which weights of one block are targets: a target's input is kept for its gradient.

    `reached`: a gradient flows through this block at all. `entered`: also into its input, as there are targets below.
    """

    qkv: bool
    o: bool
    mlp_in: bool
    down: bool
    norms: bool
    head_norms: bool
    reached: bool
    entered: bool


def trained_parts(shape: ModelShape, targets: Iterable[str]) -> list[TrainedParts]:
    """Return for each block which of its weights are targets, and whether a gradient passes it."""
    by_layer: list[set[str]] = [set() for _ in range(shape.layers)]
    below = False  # a target before the blocks: the embedding
    for name in targets:
        layer = layer_number(name)
        if layer is not None and layer < shape.layers:
            by_layer[layer].update(name.split("."))
        elif name == shape.embedding:
            below = True
    parts = []
    for words in by_layer:
        reached = below or bool(words)
        parts.append(_parts_of(words, reached, below))
        below = reached
    return parts


def _parts_of(words: set[str], reached: bool, entered: bool) -> TrainedParts:
    def has(*names: str) -> bool:
        return not words.isdisjoint(names)

    return TrainedParts(
        qkv=has("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv"),
        o=has("o_proj", "out_proj"),
        mlp_in=has("gate_proj", "up_proj", "gate_up_proj", "c_fc"),
        down=has("down_proj"),
        norms=has("input_layernorm", "post_attention_layernorm"),
        head_norms=has("q_norm", "k_norm"),
        reached=reached,
        entered=entered,
    )


def choose_kernel(
    shape: ModelShape, attention: str, element_bytes: int, rows: int, length: int, on_cpu: bool
) -> Kernel:
    """Return the attention kernel that PyTorch picks in training.

    Rows of different lengths are padded and a window shorter than the row cuts it: both need a mask, which flash on
    CUDA does not take; the memory-efficient kernel does, over repeated keys and values. Without a mask, fp32 on CUDA
    takes the efficient kernel, or the plain one where several heads share a key (torch 2.13, sdp_utils.cpp). The CPU
    has one flash-like kernel for all of these.
    """
    if attention == "eager":
        return "eager"
    windowed = shape.sliding_window is not None and length >= shape.sliding_window
    if rows > 1 or windowed:
        return "masked"
    if on_cpu or (element_bytes == 2 and shape.head_dim <= 256):
        return "flash"
    return "efficient" if shape.kv_heads == shape.heads else "math"


def norm_saved_bytes(width: int, tokens: int, element_bytes: int, trained: bool) -> int:
    """Return what one RMSNorm keeps: its fp32 input, the reciprocal root a token; a trained scale the normed input.

    T (4 width + 4), plus e T width. In fp32 the input is the residual stream itself, which nothing else keeps.
    """
    return tokens * (FP32_BYTES * width + FP32_BYTES + (element_bytes * width if trained else 0))


def attention_saved_bytes(shape: ModelShape, setting: Setting, parts: TrainedParts) -> int:
    """Return what the attention of one block keeps, its norm and the input of q, k, v not counted.

    flash       e T (2q + 2kv) + 4 heads T: queries, keys, values, output, log-sum-exp a row
    masked      the same over keys and values repeated for each head, plus the mask of each block, e rows s^2
    eager       queries, keys and values (repeated), the fp32 probabilities and in 16 bit their copy: (4 + e) heads s T;
                the output only for a trained o
    math        as eager, but computed in fp32: the probabilities once, 4 heads s T
    """
    e, tokens, length = setting.element_bytes, setting.tokens, setting.length
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    scores = shape.heads * length * tokens
    if shape.heads > shape.kv_heads and setting.kernel in ("eager", "math", "masked"):
        kv = q  # repeated for each head
    saved = (FP32_BYTES if setting.kernel == "math" else e) * tokens * (q + 2 * kv)
    if setting.kernel == "eager":
        saved += scores * (FP32_BYTES + (e if e != FP32_BYTES else 0)) + (e * tokens * q if parts.o else 0)
    elif setting.kernel == "math":
        saved += scores * FP32_BYTES + (e * tokens * q if parts.o else 0)
    else:
        saved += e * tokens * q + FP32_BYTES * shape.heads * tokens
    if setting.kernel == "masked":
        saved += e * setting.rows * length * length
    if parts.qkv:
        saved += e * tokens * shape.hidden
    return saved + _head_norms_saved(shape, setting, parts)


def _head_norms_saved(shape: ModelShape, setting: Setting, parts: TrainedParts) -> int:
    """Return what norms over each head's queries and keys keep, where the model has them."""
    if not shape.norms_heads:
        return 0
    heads = shape.heads + shape.kv_heads
    return heads * norm_saved_bytes(shape.head_dim, setting.tokens, setting.element_bytes, parts.head_norms)


def mlp_saved_bytes(shape: ModelShape, setting: Setting, parts: TrainedParts) -> int:
    """Return what the gated MLP keeps, its norm not counted: gate, activated gate, up: 3 e f T.

    Plus e f T where down is a target (its input) and e h T where gate or up is (theirs). With experts, f is that of
    one expert times those that a token visits, and their inputs are copies.
    """
    e, tokens = setting.element_bytes, setting.tokens
    visited = max(1, shape.experts_per_token)
    saved = 3 * e * tokens * shape.ffn * visited
    if parts.down:
        saved += e * tokens * shape.ffn * visited
    if parts.mlp_in:
        saved += e * tokens * shape.hidden * visited
    return saved


def block_saved_bytes(shape: ModelShape, setting: Setting, parts: TrainedParts) -> int:
    """Return what one block keeps for its backward without checkpointing; 0 where no gradient reaches it.

    The first norm of the lowest trained block keeps nothing: its input needs no gradient.
    """
    if not parts.reached:
        return 0
    norm = norm_saved_bytes(shape.hidden, setting.tokens, setting.element_bytes, parts.norms)
    norms = norm * (2 if parts.entered or parts.norms else 1)
    return norms + attention_saved_bytes(shape, setting, parts) + mlp_saved_bytes(shape, setting, parts)


def blocks_saved_bytes(shape: ModelShape, setting: Setting, parts: Sequence[TrainedParts]) -> int:
    """Return what all blocks keep; with checkpointing the input of each that a gradient reaches, e h T."""
    if setting.checkpointing:
        return sum(part.reached for part in parts) * setting.element_bytes * shape.hidden * setting.tokens
    cached = {part: block_saved_bytes(shape, setting, part) for part in set(parts)}
    return sum(cached[part] for part in parts)


def shared_saved_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what all blocks share: cosines and sines, 2 s head_dim e; a mask where there is one.

    The eager mask is additive, e rows s^2; that of the fused kernels boolean, rows s^2.
    """
    e, square = setting.element_bytes, setting.rows * setting.length**2
    eager = e * square if setting.checkpointing else 0  # freed after the forward, but for its recomputation
    mask = {"eager": eager, "masked": square}.get(setting.kernel, 0)
    return 2 * e * setting.length * shape.head_dim * (setting.rows if setting.kernel == "masked" else 1) + mask


def head_saved_bytes(shape: ModelShape, setting: Setting, norm_trained: bool, head_trained: bool) -> int:
    """Return what the last norm keeps, and the input of a trained output layer, e h T."""
    e, tokens = setting.element_bytes, setting.tokens
    saved = norm_saved_bytes(shape.hidden, tokens, e, norm_trained)
    return saved + (e * tokens * shape.hidden if head_trained else 0)


def loss_saved_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what the cross-entropy keeps between forward and backward: fp32 log-probabilities, 4 V T."""
    return FP32_BYTES * shape.vocabulary * setting.tokens


def loss_transient_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the most that the loss adds to what is saved: logits and their fp32 copies.

    At the start of the backward: log-probabilities, their gradient, the gradient of the logits, each 4 V T. The forward
    has the logits, e V T, their fp32 copy where they are not fp32, and the log-probabilities: never more. The logits
    themselves are dropped before the backward.
    """
    return 3 * FP32_BYTES * shape.vocabulary * setting.tokens


def block_backward_bytes(shape: ModelShape, setting: Setting, parts: TrainedParts, dense_bytes: int) -> int:
    """Return what the backward of one block adds to what is saved; below zero where more is freed than made.

    The larger of two moments. In the MLP: the gradient of the residual stream (e h T), and the largest of the gradient
    of down's input with the dense gradient of down; the gradients of activated gate, up and product, the product freed;
    the gradient of up's input with the dense gradient of up. In the attention: `_attention_backward_bytes`. With
    checkpointing the block is computed anew first.

    Args:
        shape: of the model.
        setting: of the micro-batch.
        parts: of the block.
        dense_bytes: the largest dense gradient of a target, plus what reads it.
    """
    e, tokens = setting.element_bytes, setting.tokens
    residual = e * tokens * shape.hidden
    wide = e * tokens * shape.ffn * max(1, shape.experts_per_token)
    product = wide if parts.down else 0
    mlp = residual + max(wide + dense_bytes, 3 * wide - product, residual - product + dense_bytes)
    added = max(mlp, _attention_backward_bytes(shape, setting, parts, residual, dense_bytes))
    return added + (_recomputed_bytes(shape, setting, parts) if setting.checkpointing else 0)


def _attention_backward_bytes(
    shape: ModelShape, setting: Setting, parts: TrainedParts, residual: int, dense_bytes: int
) -> int:
    """Return what the backward of the attention adds: MLP and second norm are freed by then.

    Score matrices: probabilities, their gradient and the gradient of the scores, 12 heads s T, instead of what was
    saved of them. Fused: gradients of queries, keys, values, and the kernel's own fp32 sums.
    """
    e, tokens = setting.element_bytes, setting.tokens
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm = norm_saved_bytes(shape.hidden, tokens, e, parts.norms)
    freed = mlp_saved_bytes(shape, setting, parts) + norm
    scores = shape.heads * setting.length * tokens
    if setting.kernel in ("eager", "math"):
        copied = e if setting.kernel == "eager" and e != FP32_BYTES else 0
        output = e * tokens * q if parts.o else 0
        return residual - freed - output + (2 * FP32_BYTES - copied) * scores
    sums = FP32_BYTES * setting.rows * shape.heads * _up(setting.length, FLASH_QUERIES)
    sums *= _up(shape.head_dim, FLASH_HEAD) + 1
    return residual - freed + e * tokens * (2 * q + 2 * kv) + sums + dense_bytes


def _recomputed_bytes(shape: ModelShape, setting: Setting, parts: TrainedParts) -> int:
    """Return what one block keeps when it is computed anew; in fp32 its input is the checkpoint, counted already."""
    saved = block_saved_bytes(shape, setting, parts)
    shared = setting.element_bytes == FP32_BYTES and parts.entered
    return saved - (FP32_BYTES * shape.hidden * setting.tokens if shared else 0)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
