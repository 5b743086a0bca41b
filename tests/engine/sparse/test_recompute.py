"""Blocks that keep little: the same gradients as the model's own, and only what they say they keep."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.planner.recompute import KNOWN_FAMILIES
from engine.planner.storages import StorageMeter
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.recompute import RecomputedBlocks, kept_by_model
from engine.spec import RunSpec
from engine.train.checkpointing import checkpoint_blocks

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = 48
LEVELS: dict[str, dict[str, Any]] = {
    "elementwise": {"recompute": "elementwise"},
    "mlp": {"recompute": "mlp"},
    "mlp of two": {"recompute": "mlp", "recompute_blocks": 2},
    "blocks": {"recompute": "blocks", "recompute_blocks": 1},
    "inputs in main memory": {"recompute": "blocks", "recompute_blocks": 2, "offload_activations": True},
}


def _model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.for_model(family, **SMALL)
    attention = "eager" if family == "gemma2" else "sdpa"  # whose soft cap the fused kernels do not know
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name and weight.dim() == 1:  # as trained ones are
            nn.init.normal_(weight, 0.0 if family.startswith("gemma") else 1.0, 0.2)
    return model.train()


def _attach(model: nn.Module, **fields: Any) -> SparseTuning:
    tuning = attach(model, RunSpec(model="tiny", method="random", density=0.05, **fields))
    if tuning.spec.recompute == "blocks":
        checkpoint_blocks(model, tuning.spec)
    return tuning


def _gradient(model: Any, tuning: SparseTuning) -> Tensor:
    ids = torch.randint(0, 128, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tuning.end_micro_step()
    grads = [values.grad for values in tuning.values if values.grad is not None]
    assert len(grads) == len(tuning.values)
    return torch.cat(grads).double()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", sorted(KNOWN_FAMILIES))
def test_gradients_are_those_of_the_models_own_forward(family: str, level: str) -> None:
    plain = _model(family)
    lean = copy.deepcopy(plain)
    expected = _gradient(plain, _attach(plain))
    found = _gradient(lean, _attach(lean, **LEVELS[level]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi"])
def test_in_16_bit_the_error_is_no_larger_than_that_of_the_models_own(family: str) -> None:
    truth = _model(family)
    plain, lean = copy.deepcopy(truth).bfloat16(), copy.deepcopy(truth).bfloat16()
    expected = _gradient(truth, _attach(truth))
    own = (_gradient(plain, _attach(plain)) - expected).norm()
    assert (_gradient(lean, _attach(lean, recompute="mlp")) - expected).norm() <= 1.02 * own


def test_two_backwards_in_a_row_are_alike() -> None:
    model = _model("llama")
    tuning = _attach(model, recompute="mlp")
    first = _gradient(model, tuning)
    torch.testing.assert_close(_gradient(model, tuning), 2 * first)


def _kept_numbers(**fields: Any) -> float:
    """Return what one token leaves in one block of a model without biases, in numbers of the model's dtype."""
    numbers = []
    for layers in (2, 3):
        config = AutoConfig.for_model("llama", **{**SMALL, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config).bfloat16().train()
        _attach(model, **fields)
        meter = StorageMeter()
        with meter:
            ids = torch.zeros(1, TOKENS, dtype=torch.int64)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        alive = {event for event in meter.ledger.events if event >= 0} - {
            ~event for event in meter.ledger.events if event < 0
        }
        numbers.append(sum(meter.ledger.storages[each].num_bytes for each in alive))
        del loss
    return (numbers[1] - numbers[0]) / 2 / TOKENS


def test_a_block_keeps_what_costs_a_matrix_product() -> None:
    width, ffn, heads = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["num_attention_heads"]
    small = 2 * heads + 2 * 2  # log-sum-exps of the attention and the roots of two norms, fp32 in a dtype of 16 bits
    assert _kept_numbers(recompute="elementwise") == 6 * width + 2 * ffn + small
    assert _kept_numbers(recompute="mlp") == 6 * width + small
    assert _kept_numbers() > 1.5 * (6 * width + 2 * ffn)


def test_a_trained_norm_keeps_its_own_forward() -> None:
    model = _model("llama")
    tuning = _attach(model, recompute="elementwise", targets=("mlp", "input_layernorm"))
    layer = model.model.layers[0]
    assert "forward" not in vars(layer.input_layernorm)
    assert "forward" in vars(layer.post_attention_layernorm)
    assert _gradient(model, tuning).isfinite().all()


def test_detached_the_model_has_its_own_forwards_again() -> None:
    model = _model("qwen3")
    before = {name for name, module in model.named_modules() if "forward" in vars(module)}
    tuning = _attach(model, recompute="elementwise")
    assert any("mlp" in name and "forward" in vars(module) for name, module in model.named_modules())
    tuning.detach()
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == before


def test_a_model_of_another_kind_is_left_alone() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    kept = kept_by_model(RunSpec(model="tiny", recompute="elementwise"), model)
    RecomputedBlocks(model, kept, ())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("level", ["elementwise", "mlp"])
@pytest.mark.parametrize("targets", ["linear", ("model.layers.0.mlp.down_proj.*",), ("gate_proj",)])
def test_nothing_that_was_made_again_outlives_the_backward(level: str, targets: Any) -> None:
    model = _model("llama")
    tuning = _attach(model, recompute=level, targets=targets)
    meter = StorageMeter()
    with meter:
        _gradient(model, tuning)
        for values in tuning.values:
            values.grad = None
    events = meter.ledger.events
    assert {event for event in events if event >= 0} == {~event for event in events if event < 0}


@pytest.mark.parametrize("level", ["elementwise", "mlp"])
def test_a_backward_makes_each_activation_once_again(level: str) -> None:
    model = _model("llama")
    calls = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    _gradient(model, _attach(model, recompute=level))
    assert len(calls) == 2 * len(model.model.layers)
