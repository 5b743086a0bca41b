"""The loss in chunks: for which families it is known, how many tokens a chunk has, and the bytes it takes.

The logits of all tokens are the largest tensor of a run with checkpointing. `engine.chunked_loss` makes those of a few
tokens at a time, and their gradient at once, so that what is left of them is the gradient of the hidden states.
Symbols as in `activations.py`; V vocabulary, c tokens of a chunk.
"""

from engine.planner.activations import FP32_BYTES, Setting
from engine.planner.shape import ModelShape

# Logits of a chunk: 64 MiB in fp32. At a vocabulary of 128 K these are 128 tokens, one tile of a matrix product.
CHUNK_ENTRIES = 2**24
_TILE = 128

# Families whose logits are the output layer over the last hidden states, with no more than the scale and the soft cap
# that config.json names. Others take the plain loss. Compared with it class by class.
CHUNKED_FAMILIES = frozenset(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "granite",
        "smollm3",
        "cohere",
        "cohere2",
        "olmo",
        "olmo2",
        "glm4",
        "arcee",
        "starcoder2",
        "stablelm",
        "mixtral",
        "qwen3_moe",
    )
)


def chunk_tokens(vocabulary: int) -> int:
    """Return the tokens of a chunk: as many as `CHUNK_ENTRIES` allow, whole tiles of 128 where it is one or more."""
    tokens = max(1, CHUNK_ENTRIES // vocabulary)
    return tokens - tokens % _TILE if tokens > _TILE else tokens


def chunked_saved_bytes(shape: ModelShape, setting: Setting, head_trained: bool) -> int:
    """Return what the loss in chunks leaves for the backward: the gradient of the hidden states, e h T.

    And that of a trained output layer, summed in fp32, 4 V h. Ignored labels have no rows; the plan takes every token
    as labelled.
    """
    saved = setting.element_bytes * shape.hidden * setting.tokens
    return saved + (FP32_BYTES * shape.vocabulary * shape.hidden if head_trained else 0)


def chunked_forward_bytes(shape: ModelShape, setting: Setting, head_trained: bool) -> int:
    """Return what the last chunk of the forward holds beside what is left for the backward.

    The hidden states of the labelled tokens, e h T; the logits of a chunk in fp32, 4 V c, and in 16 bit beside them as
    they come and as their gradient goes, e V c. A trained output layer: the product that is added, e V h, beside that
    gradient alone. On a GPU the logits of Liger-Kernel's chunk, where they are more: it may be installed there.
    """
    e, chunk = setting.element_bytes, min(setting.tokens, chunk_tokens(shape.vocabulary))
    logits = shape.vocabulary * chunk * (FP32_BYTES + (e if e != FP32_BYTES else 0))
    if not setting.on_cpu:
        logits = max(logits, e * shape.vocabulary * _liger_chunk(shape, setting.tokens))
    product = e * shape.vocabulary * (chunk + shape.hidden) if head_trained else 0
    return e * shape.hidden * setting.tokens + max(logits, product)


def _liger_chunk(shape: ModelShape, tokens: int) -> int:
    """Return the tokens of a chunk of Liger-Kernel's: a power of two whose logits are about as many as T h."""
    parts = -(-shape.vocabulary // shape.hidden)
    return min(tokens, 1 << (-(-tokens // parts) - 1).bit_length())


def chunked_backward_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what the start of the backward adds: the gradient of the hidden states scaled, and put in its places.

    2 e h T; in 16 bit it is scaled in fp32, 4 h T instead of one of them.
    """
    return (setting.element_bytes + FP32_BYTES) * shape.hidden * setting.tokens
