"""What LoRA and IA3 of the PEFT library keep for the backward and add to it. Bytes; symbols as in `activations.py`.

The adapters are fp32 over any base. A 16-bit layer's input or output is cast for them, and the copies are what counts.
"""

from collections import defaultdict
from collections.abc import Iterable

from engine.planner.activations import FP32_BYTES, Setting
from engine.planner.shape import ModelShape
from engine.spec import RunSpec
from engine.targets import is_feedforward, layer_number


def lora_saved_bytes(inputs: int, rank: int, tokens: int, element_bytes: int) -> int:
    """Return what LoRA keeps beside one layer: 4 T r, the input of its second matrix, in fp32.

    In 16 bit also 4 T in, the fp32 copy of the layer's input, each layer its own. In fp32 that is the input itself, and
    counts as that of a trained weight (`TrainedParts`).
    """
    copied = FP32_BYTES * inputs if element_bytes != FP32_BYTES else 0
    return tokens * (copied + FP32_BYTES * rank)


def ia3_saved_bytes(width: int, tokens: int, element_bytes: int, widened: bool) -> int:
    """Return what IA3 keeps for one layer: what its factors multiply, e T width, or 4 T width in fp32.

    Args:
        width: outputs of the layer; of the MLP's last layer its inputs.
        tokens: of the micro-batch.
        element_bytes: of the base.
        widened: whether PEFT multiplies in fp32 whatever the base is: over NF4, and before the MLP's last layer.
    """
    return tokens * width * (FP32_BYTES if widened else element_bytes)


def adapters_saved_bytes(shape: ModelShape, setting: Setting, spec: RunSpec, names: Iterable[str]) -> dict[int, int]:
    """Return what the adapters beside the weights `names` keep, for each block that has one."""
    blocks: dict[int, int] = defaultdict(int)
    for name in names:
        outputs, inputs = shape.tensors[name]
        last = is_feedforward(name)
        if spec.method == "lora":
            saved = lora_saved_bytes(inputs, spec.lora_rank, setting.tokens, setting.element_bytes)
        else:
            widened = last or spec.quantization == "nf4"
            saved = ia3_saved_bytes(inputs if last else outputs, setting.tokens, setting.element_bytes, widened)
        blocks[layer_number(name) or 0] += saved
    return dict(blocks)


def adapter_backward_bytes(shape: ModelShape, setting: Setting, method: str, names: Iterable[str]) -> int:
    """Return what adapters add to the backward of a block, at the MLP's last layer; without one there, nothing.

    The block alone has three tensors of the MLP's width there, 3 e f T (`block_backward_bytes`). LoRA: the gradient of
    the input in fp32 instead of one of them, (4 - e) f T. IA3: gradient, gradient times input and times factors, all in
    fp32 instead, 3 (4 - e) f T. In fp32 both fit into what the block has.
    """
    if not any(is_feedforward(name) for name in names):
        return 0
    return (1 if method == "lora" else 3) * (FP32_BYTES - setting.element_bytes) * setting.tokens * shape.ffn
