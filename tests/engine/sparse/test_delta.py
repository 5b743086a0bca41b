from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from engine.errors import DeltaError
from engine.sparse.attach import attach
from engine.sparse.delta import SparseDelta
from engine.sparse.entries import ActiveEntries
from engine.spec import RunSpec


def _weight(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(32, 16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_write_back_rounds_base_plus_value_and_restore_is_bit_exact(dtype: torch.dtype) -> None:
    weight = _weight(dtype)
    base = weight.detach().clone()
    entry = ActiveEntries("w", weight, 40)
    entry.place(torch.randperm(512)[:40].sort().values.int())
    with torch.no_grad():
        entry.values.normal_(std=1e-3)
    entry.write_back()
    at = entry.placed.long()
    expected = (base.flatten()[at].float() + entry.values).to(dtype)
    assert torch.equal(weight.detach().flatten()[at], expected)
    entry.restore()
    assert torch.equal(weight.detach(), base)


def test_small_updates_add_up_in_bf16() -> None:
    """Steps of 1e-5 are far below the spacing of bf16 numbers near one; their sum is not lost."""
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    entry = ActiveEntries("w", weight, 64)
    entry.place(torch.arange(64, dtype=torch.int32))
    for _ in range(1000):
        with torch.no_grad():
            entry.values.add_(1e-5)
        entry.write_back()
    assert torch.equal(weight.detach(), torch.full((64,), 1.01).to(torch.bfloat16))


def _tuned(model: LlamaForCausalLM) -> SparseDelta:
    tuning = attach(model, RunSpec(model="tiny", method="random", density=0.05, seed=3))
    with torch.no_grad():
        for entry in tuning.entries:
            entry.values.normal_(std=0.01)
    tuning.write_back()
    delta = tuning.delta()
    tuning.detach()
    return delta


def test_saved_delta_applies_and_restores_the_base_bit_for_bit(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    _tuned(tiny_llama).save(str(tmp_path))  # as a library is called: a folder by its name
    applied = SparseDelta.load(str(tmp_path)).apply(tiny_llama)
    changed = sum(int((tensor != base[name]).sum()) for name, tensor in tiny_llama.state_dict().items())
    assert changed == sum(entry.num_active for entry in applied)
    for entry in applied:
        entry.restore()
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny_llama.state_dict().items())


def test_delta_refuses_another_base(tiny_llama: LlamaForCausalLM) -> None:
    delta = _tuned(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(DeltaError, match="not those the delta was trained on"):
        delta.apply(tiny_llama)


def test_delta_is_the_same_over_fp32_and_bf16_copies(tiny_llama: LlamaForCausalLM) -> None:
    delta = _tuned(tiny_llama)
    assert len(delta.apply(tiny_llama.bfloat16())) == len(delta.tensors)


def test_damaged_delta_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="holds no delta that can be read"):
        SparseDelta.load(tmp_path)
