"""Weights as a model holds them: dense parameters, or NF4 (QLoRA, arXiv:2305.14314) through bitsandbytes.

Beside `blockwise.py` the only file that knows bitsandbytes. qSpIEL (arXiv:2401.16405, section 3.4) and SIFT over NF4
compute with dequantise(W) + delta, rebuilt for the length of each use.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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


def keep_packing(model: nn.Module) -> None:
    """Keep the 4-bit weights of `model` as they were quantised.

    On CPUs with AVX512-BF16, bitsandbytes lays them out anew at the first forward without gradients, and rounds their
    scales to bf16 by the way: another model from then on, and one through which no gradient flows.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
