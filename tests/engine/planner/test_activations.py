"""Closed forms against what autograd really saves on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.planner.activations import (
    Setting,
    blocks_saved_bytes,
    choose_kernel,
    head_saved_bytes,
    loss_saved_bytes,
    shared_saved_bytes,
    trained_parts,
)
from engine.planner.shape import read_shape, target_tensors

LENGTH = 256
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


def _saved_by_autograd(model: PreTrainedModel, targets: list[str]) -> int:
    """Bytes of distinct storages that the forward keeps, weights not counted."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in targets)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive until the loss is dropped, so that no address is used twice

    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "smollm3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["linear", "attention", "all"])
def test_saved_activations_are_what_autograd_saves(
    family: str, attention: str, dtype: torch.dtype, targets: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **CONFIG)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
    shape = read_shape(str(tmp_path))
    names = list(target_tensors(shape, targets))
    kernel = choose_kernel(shape, attention, dtype.itemsize, 1, LENGTH, on_cpu=True)
    setting = Setting(1, LENGTH, dtype.itemsize, kernel, checkpointing=False)
    planned = blocks_saved_bytes(shape, setting, trained_parts(shape, names)) + shared_saved_bytes(shape, setting)
    planned += head_saved_bytes(shape, setting, targets == "all", targets == "all")
    planned += loss_saved_bytes(shape, setting)
    assert planned == pytest.approx(_saved_by_autograd(model, names), rel=0.01)
