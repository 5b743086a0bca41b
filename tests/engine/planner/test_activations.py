"""Closed forms against what autograd really saves on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.hardware import Device
from engine.planner.moments import after_forward_bytes
from engine.planner.shape import read_shape
from engine.planner.workload import build_workload
from engine.spec import RunSpec
from engine.units import GIB

CPU = Device("cpu", "CPU", 16 * GIB, 16 * GIB)
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
    fields = {"dtype": str(dtype).removeprefix("torch."), "sequence_length": LENGTH, "attention": attention}
    work = build_workload(RunSpec(model=str(tmp_path), targets=targets, **fields), read_shape(str(tmp_path)), CPU)
    saved = _saved_by_autograd(model, list(work.numels))
    assert after_forward_bytes(work) == pytest.approx(saved, rel=0.01)
