"""The function way to the gradient: against hooks, against finite differences, and over NF4 against a dense twin."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from engine.errors import DeltaError
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.base_weight import NF4Weight, base_weights, nf4_config
from engine.sparse.delta import SparseDelta
from engine.sparse.entries import ActiveEntries
from engine.sparse.linear import SparseDeltaLinear
from engine.sparse.optimizers import build_optimizer
from engine.sparse.recipes import recipe_of
from engine.spec import BASELINES, RunSpec, choices

METHODS = [method for method in choices("method") if method not in BASELINES]


def _spec(method: str) -> RunSpec:
    return RunSpec(model="tiny", method=method, density=0.05, learning_rate=1e-2, period=3, estimation_steps=2)


def _train(model: nn.Module, tuning: SparseTuning, steps: int = 7) -> None:
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    tuning.begin_reselection(optimizer, steps)
    batches = torch.randint(0, 128, (steps, 2, 12), generator=torch.Generator().manual_seed(5))
    if tuning.spec.method in ("sift", "fisher"):
        tuning.begin_selection(1)
    for step, ids in enumerate(batches, 1):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        model(input_ids=ids, labels=ids).loss.backward()
        tuning.end_micro_step()
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel:
            tuning.spiel.end_step(step, 1.0)


def _assert_same(one: SparseTuning, other: SparseTuning, atol: float) -> None:
    for left, right in zip(one.entries, other.entries, strict=True):
        assert torch.equal(left.placed, right.placed), left.name
        torch.testing.assert_close(left.values, right.values, atol=atol, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_function_and_hook_agree_in_fp64(tiny_llama: LlamaForCausalLM, method: str) -> None:
    models = [tiny_llama.double(), copy.deepcopy(tiny_llama).double()]
    tunings = [attach(model, _spec(method), functions=way) for model, way in zip(models, (False, True), strict=True)]
    for model, tuning in zip(models, tunings, strict=True):
        _train(model, tuning)
    _assert_same(*tunings, atol=1e-12)
    assert torch.equal(models[0].state_dict()["lm_head.weight"], models[1].state_dict()["lm_head.weight"])


def test_gradient_of_the_function_passes_gradcheck() -> None:
    layer = nn.Linear(6, 4).double()
    entry = ActiveEntries("weight", layer.weight, 5)
    entry.place(torch.tensor([0, 3, 7, 12, 20], dtype=torch.int32))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    taken: list[Tensor] = []  # the dense gradients of the weight

    def output(at: Tensor) -> Tensor:
        return SparseDeltaLinear.apply(
            at, entry.values, layer.bias, entry, lambda _, g, x: taken.append(g.T @ x), recipe_of(at)
        )

    assert torch.autograd.gradcheck(lambda at, _: output(at), (x, layer.bias))
    taken.clear()
    weights = torch.randn(3, 4, dtype=torch.float64)
    (output(x) * weights).sum().backward()
    torch.testing.assert_close(taken[0], weights.T @ x.detach(), atol=1e-12, rtol=0)


@pytest.fixture
def quantised(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> LlamaForCausalLM:
    """The tiny Llama with its linear layers in NF4 under double quantisation."""
    tiny_llama.save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=nf4_config(torch.float32), device_map={"": "cpu"}, dtype=torch.float32
    )


def _dense_twin(quantised: LlamaForCausalLM, like: LlamaForCausalLM) -> LlamaForCausalLM:
    twin = copy.deepcopy(like).double()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, weight in base_weights(quantised).items():
            parameters[name].copy_(weight.dense() if isinstance(weight, NF4Weight) else weight)
    return twin


@pytest.mark.parametrize("method", METHODS)
def test_nf4_equals_the_twin_of_the_dequantised_weights(
    quantised: LlamaForCausalLM, tiny_llama: LlamaForCausalLM, method: str
) -> None:
    """The twin computes in fp64; the NF4 model too, but for its norms and embeddings, which are made fp64 as well."""
    twin = _dense_twin(quantised, tiny_llama)
    for parameter in quantised.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.double()
    tunings = [attach(model, _spec(method)) for model in (quantised, twin)]
    for entry in tunings[0].entries:
        entry.values.data = entry.values.data.double()
    for model, tuning in zip((quantised, twin), tunings, strict=True):
        _train(model, tuning)
    _assert_same(*tunings, atol=1e-12)


def test_nf4_counts_entries_that_are_no_longer_trained(quantised: LlamaForCausalLM, tmp_path: Path) -> None:
    ids = torch.randint(0, 128, (1, 12))
    untuned = quantised(input_ids=ids).logits.detach()
    tuning = attach(quantised, _spec("sift"))
    _train(quantised, tuning)
    tuned = quantised(input_ids=ids).logits.detach()
    for entry in tuning.entries:
        entry.move(torch.arange(entry.num_active // 2, dtype=torch.int32))
    torch.testing.assert_close(quantised(input_ids=ids).logits, tuned)
    tuning.delta().save(tmp_path)
    tuning.detach()
    torch.testing.assert_close(quantised(input_ids=ids).logits, untuned)
    SparseDelta.load(tmp_path).apply(quantised)
    torch.testing.assert_close(quantised(input_ids=ids).logits, tuned)


def test_nf4_delta_applies_restores_and_refuses_a_dense_base(
    quantised: LlamaForCausalLM, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    ids = torch.randint(0, 128, (1, 12))
    untuned = quantised(input_ids=ids).logits.detach()
    tuning = attach(quantised, _spec("sift"))
    _train(quantised, tuning)
    tuned = quantised(input_ids=ids).logits.detach()
    tuning.delta().save(tmp_path)
    tuning.detach()
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    torch.testing.assert_close(quantised(input_ids=ids).logits, untuned)
    applied = SparseDelta.load(tmp_path).apply(quantised)
    torch.testing.assert_close(quantised(input_ids=ids).logits, tuned)
    for entry in applied:
        entry.restore()
    torch.testing.assert_close(quantised(input_ids=ids).logits, untuned)
    with pytest.raises(DeltaError, match="trained over a base with quantization=nf4"):
        SparseDelta.load(tmp_path).apply(tiny_llama)
