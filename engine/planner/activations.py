"""One micro-batch, the attention kernel it takes, and what blocks share and the loss adds. Bytes.

Symbols: T tokens of a micro-batch (rows * length), s length, V vocabulary, e bytes per element of the base. What the
blocks themselves keep and take is in `operations.py` and `blocks.py`.
"""

from dataclasses import dataclass
from typing import Literal

from engine.planner.shape import ModelShape

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
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length


def choose_kernel(
    shape: ModelShape,
    attention: str,
    element_bytes: int,
    rows: int,
    length: int,
    on_cpu: bool,
    sm: int = 0,
    *,
    window: int | None = None,
) -> Kernel:
    """Return the attention kernel that PyTorch picks in training, in a layer that sees `window` tokens, None: all.

    Rows of different lengths are padded and a window shorter than the row cuts it: both need a mask, which flash on
    CUDA does not take; the memory-efficient kernel does, over repeated keys and values. Without a mask, fp32 on CUDA
    takes the efficient kernel, or the plain one where several heads share a key (torch 2.13, sdp_utils.cpp). The CPU
    has one flash-like kernel for all of these, and plain products where there is dropout. Flash on CUDA begins at
    compute capability 8.0 (`sm` 80; 0: unknown).
    """
    if attention == "eager" or not shape.fused_attention:
        return "eager"
    if on_cpu and shape.layout.attention_dropout:
        return "math"
    if rows > 1 or (window is not None and length >= window):
        return "masked"
    if on_cpu or (element_bytes == 2 and shape.head_dim <= 256 and not 0 < sm < 80):
        return "flash"
    return "efficient" if shape.kv_heads == shape.heads else "math"


def shared_saved_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what all blocks share: cosines and sines, 2 s head_dim e; masks where blocks are computed anew.

    The eager mask is additive, e rows s^2, one for each window; that of the fused kernels boolean, rows s^2. Without
    checkpointing they are freed after the forward.
    """
    e, square = setting.element_bytes, setting.rows * setting.length**2
    windows = len(set(shape.windows))
    mask = {"eager": windows * e * square, "masked": square}.get(setting.kernel, 0) if setting.checkpointing else 0
    turned = int(shape.head_dim * shape.layout.rotary)
    return 2 * e * setting.length * turned * (setting.rows if setting.kernel == "masked" else 1) + mask


def loss_saved_bytes(vocabulary: int, predictions: int) -> int:
    """Return what the cross-entropy keeps between forward and backward: fp32 log-probabilities, 4 V T.

    Args:
        vocabulary: classes of a prediction.
        predictions: tokens that have logits.
    """
    return FP32_BYTES * vocabulary * predictions


def loss_transient_bytes(vocabulary: int, predictions: int) -> int:
    """Return the most that the loss adds to what is saved: logits and their fp32 copies.

    At the start of the backward: log-probabilities, their gradient, the gradient of the logits, each 4 V T. The forward
    has the logits, e V T, their fp32 copy where they are not fp32, and the log-probabilities: never more. The logits
    themselves are dropped before the backward.
    """
    return 3 * FP32_BYTES * vocabulary * predictions


def up_to(number: int, multiple: int) -> int:
    """Return `number` rounded up to a multiple."""
    return -(-number // multiple) * multiple
