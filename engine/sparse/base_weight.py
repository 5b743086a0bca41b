"""Weights as a model holds them: dense parameters, or NF4 (QLoRA, arXiv:2305.14314) through bitsandbytes.

Beside `blockwise.py` the only file that knows bitsandbytes. qSpIEL (arXiv:2401.16405, section 3.4) and SIFT over NF4
compute with dequantise(W) + delta, rebuilt for the length of each use.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# At each import it asks for an optional kernel by the name of a package that nobody here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

NF4_BLOCK = 64  # entries that share an absmax; bitsandbytes' default
NF4_NESTED_BLOCK = 256  # absmax values that share a scale under double quantisation


@dataclass(frozen=True)
class NF4Packing:
    """What an NF4 weight under double quantisation is made of; entry i is, rounded to the weight's dtype,

    code[c_i] * (scale_code[absmax[i // 64]] * scales[i // 64 // 256] + offset), each operation rounded to fp32.

    `packed`: (ceil(numel / 2),) uint8, codes c_i two to a byte, the first one in the high half; `code`: (16,) fp32;
    `absmax`: (ceil(numel / 64),) uint8; `scales`: fp32; `scale_code`: (256,) fp32; `offset`: 0-dim fp32.
    """

    packed: Tensor
    code: Tensor
    absmax: Tensor
    scales: Tensor
    scale_code: Tensor
    offset: Tensor


class NF4Weight:
    """The 4-bit weight of one linear layer, seen as the dense matrix it stands for."""

    def __init__(self, packed: nn.Parameter) -> None:
        """Wrap a `Params4bit` that is quantised already."""
        self.packed = packed
        self._state: Any = packed.quant_state  # type: ignore[attr-defined]

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return torch.Size(self._state.shape)

    @property
    def device(self) -> torch.device:
        """Where the packed weight lies."""
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is dequantised to."""
        dtype: torch.dtype = self._state.dtype
        return dtype

    def numel(self) -> int:
        """Return the number of entries of the dense matrix."""
        return self.shape.numel()

    def dense(self) -> Tensor:
        """Return the dequantised matrix, (out_features, in_features): a new tensor."""
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(self.packed.data, self._state)
        return dense.view(self.shape)

    @property
    def packing(self) -> NF4Packing | None:
        """The parts of the packed weight; None where it is packed in another way than `nf4_config` asks for."""
        state = self._state
        if (state.quant_type, state.blocksize, state.nested) != ("nf4", NF4_BLOCK, True):
            return None
        if state.state2.blocksize != NF4_NESTED_BLOCK:
            return None
        packed, scales = self.packed.detach().view(-1).view(torch.uint8), state.state2
        return NF4Packing(packed, state.code, state.absmax, scales.absmax, scales.code, state.offset.to(packed.device))


def quantise_nf4(dense: Tensor) -> NF4Weight:
    """Return `dense`, (out_features, in_features), in NF4 under double quantisation."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    packed, state = quantize_4bit(dense, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    return NF4Weight(Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True))


def base_weights(model: nn.Module) -> dict[str, nn.Parameter | NF4Weight]:
    """Return every parameter of `model` by name, tied ones once, those in NF4 as `NF4Weight`."""
    return {
        name: NF4Weight(parameter) if getattr(parameter, "quant_state", None) is not None else parameter
        for name, parameter in model.named_parameters()
    }


def nf4_config(dtype: torch.dtype, dense: Sequence[str] = ()) -> Any:
    """Return the transformers configuration that loads all linear layers but the output layer in NF4.

    Args:
        dtype: that the layers compute in. Double quantisation is on: 4.127 bits a weight.
        dense: modules that stay dense instead of the output layer.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*dense] or None,
    )


def describe_in_nf4(model: "PreTrainedModel", dtype: torch.dtype, dense: Sequence[str] = ()) -> None:
    """Turn the linear layers of a model on the meta device into those that `nf4_config` loads, sizes and no numbers."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(nf4_config(dtype, dense))
    quantizer.preprocess_model(model, device_map=None)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            shape = module.weight.shape
            packed = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            module.weight = Params4bit(
                packed, requires_grad=False, quant_state=_nf4_state(shape, dtype), quant_type="nf4", bnb_quantized=True
            )
            module.quant_state = module.weight.quant_state
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)


def _nf4_state(shape: torch.Size, dtype: torch.dtype) -> Any:
    """Return what bitsandbytes keeps beside a weight of NF4 with double quantisation, on the meta device."""
    from bitsandbytes.functional import QuantState

    def empty(numel: int, kind: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=kind, device="meta")

    blocks = -(-shape.numel() // NF4_BLOCK)
    scales = QuantState(
        absmax=empty(-(-blocks // NF4_NESTED_BLOCK), torch.float32),
        code=empty(256, torch.float32),
        blocksize=NF4_NESTED_BLOCK,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=empty(blocks, torch.uint8),
        shape=shape,
        dtype=dtype,
        blocksize=NF4_BLOCK,
        code=empty(16, torch.float32),
        quant_type="nf4",
        offset=torch.empty((), dtype=torch.float32, device="meta"),
        state2=scales,
    )


def packed_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """Return the tensors that a parameter consists of: itself, and what NF4 keeps beside it."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return [parameter]
    return [parameter, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def keep_packing(model: nn.Module) -> None:
    """Keep the 4-bit weights of `model` as they were quantised.

    On CPUs with AVX512-BF16, bitsandbytes lays them out anew at the first forward without gradients, and rounds their
    scales to bf16 by the way: another model from then on, and one through which no gradient flows.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
