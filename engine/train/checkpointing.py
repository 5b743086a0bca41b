"""Blocks that keep their input alone and are computed anew in the backward, the input in main memory if need be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.errors import ModelError
from engine.sparse.recompute import kept_by_model
from engine.spec import RunSpec
from engine.targets import layer_number


def checkpoint_blocks(model: PreTrainedModel, spec: RunSpec) -> None:
    """Let the blocks be computed anew of which a run of `spec` keeps nothing inside.

    With `gradient_checkpointing`, all blocks, transformers does it in its own way.

    Raises:
        ModelError: it has none for this family, or the family has no blocks that could be.
    """
    if spec.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise _unknown("gradient_checkpointing must be false", model, "true. Set gradient_checkpointing=false")
        # Older releases of transformers have the second name alone; those with both warn of it.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        if not spec.offload_activations:
            return
    kept = kept_by_model(spec, model)
    found = False
    for name, module in model.named_modules():
        layer = layer_number(f"{name}.")
        inner = layer is None or layer >= len(kept) or kept[layer].inside  # of a tower beside the blocks as well
        if isinstance(module, GradientCheckpointingLayer) and not inner:
            way = _offloaded if spec.offload_activations else partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = found = True
            module._gradient_checkpointing_func = way  # type: ignore[assignment]
    if spec.recompute == "blocks" and not found:
        raise _unknown("recompute must be nothing", model, "'blocks'. Set recompute=nothing")


def _unknown(rule: str, model: PreTrainedModel, got: str) -> ModelError:
    family = model.config.model_type
    return ModelError(f"{rule} for models of the family {family!r}, which transformers cannot compute anew, got {got}.")


def _offloaded(block: Callable[..., Any], *inputs: Any) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(_to_main_memory, _to_device):
        return checkpoint(block, *inputs, use_reentrant=False)


def _to_main_memory(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # From a GPU into pinned memory, in the order of its stream: nobody waits.
    return tensor.device, tensor.to("cpu", non_blocking=True)


def _to_device(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor.to(device, non_blocking=True)
