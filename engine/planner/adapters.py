"""What LoRA and IA3 of the PEFT library train beside a layer, as the planner's tapes have it. Bytes."""

from engine.planner.formulas import FP32_BYTES
from engine.planner.operations import Adapter
from engine.planner.tape import Weight
from engine.spec import RunSpec
from engine.targets import adapter_numel, is_feedforward


def adapter_of(spec: RunSpec, name: str, shape: tuple[int, ...], first: bool) -> Adapter:
    """Return the adapter beside a weight; its matrices or factors are fp32 over any base.

    Args:
        spec: of lora or ia3.
        name: of the weight.
        shape: of the weight.
        first: whether the backward finds no gradients and leaves its own.
    """

    def trained(numel: int) -> Weight:
        return Weight(FP32_BYTES * numel, 0, FP32_BYTES * numel if first else 0)

    if spec.method == "lora":
        outputs, inputs = shape
        return Adapter(spec.lora_rank, trained(spec.lora_rank * inputs), trained(spec.lora_rank * outputs))
    last = is_feedforward(name)
    factors = trained(adapter_numel(name, (shape[0], shape[1]), "ia3", 0))
    # PEFT multiplies in fp32 over NF4, and before the MLP's last layer.
    return Adapter(0, factors, factors, widened=last or spec.quantization == "nf4", scales_input=last)
