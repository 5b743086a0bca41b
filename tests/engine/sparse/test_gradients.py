"""Gradients by function at work on a model: equal to hooks, dense only where a dense gradient is wanted."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.sparse.attach import SparseTuning, attach
from engine.sparse.gradient_costs import DEFAULT_COSTS
from engine.sparse.gradients import COSTS_KEY, LinearGradients
from engine.sparse.optimizers import build_optimizer
from engine.sparse.probe import GradientProbe
from engine.spec import RunSpec, choices

WAYS = [way for way in choices("gradient_way") if way != "auto"]


def _spec(**fields: object) -> RunSpec:
    return RunSpec(model="tiny", density=0.05, learning_rate=1e-2, period=4, estimation_steps=3, **fields)


def _backward(model: nn.Module, tuning: SparseTuning, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    tuning.end_micro_step()


def _train(model: nn.Module, tuning: SparseTuning, steps: int, accumulation: int) -> None:
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    tuning.begin_reselection(optimizer, steps)
    if tuning.spec.method == "sift":
        tuning.begin_selection(accumulation)
    for step, batches in enumerate(torch.randint(0, 128, (steps, accumulation, 2, 12)), 1):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        for ids in batches:
            _backward(model, tuning, ids)
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel:
            tuning.spiel.end_step(step, 1.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["sift", "spiel-ag", "spiel-ma"])
def test_every_way_trains_as_hooks_do(tiny_llama: LlamaForCausalLM, method: str, way: str) -> None:
    models = [tiny_llama.double(), copy.deepcopy(tiny_llama).double()]
    spec = _spec(method=method, gradient_way=way, targets="all")
    hook, function = (attach(each, spec, functions=on) for each, on in zip(models, (False, True), strict=True))
    for model, tuning in zip(models, (hook, function), strict=True):
        torch.manual_seed(1)
        _train(model, tuning, steps=9, accumulation=2)
    for left, right in zip(hook.entries, function.entries, strict=True):
        assert torch.equal(left.placed, right.placed), left.name
        torch.testing.assert_close(left.values, right.values, atol=1e-12, rtol=0)


def _biased() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    return LlamaForCausalLM(config).double()


def _values_gradients(model: LlamaForCausalLM, ids: Tensor, *, functions: bool, **fields: object) -> list[Tensor]:
    tuning = attach(model, _spec(method="random", **fields), functions=functions)
    _backward(model, tuning, ids)
    grads = [values.grad.clone() for values in tuning.values]
    tuning.detach()
    return grads


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_compact_entries_have_the_gradient_of_plain_ones(way: str, functions: bool) -> None:
    model, ids = _biased().bfloat16(), torch.randint(0, 128, (2, 12))
    plain, compact = (
        _values_gradients(model, ids, functions=functions, targets="all", gradient_way=way, optimizer_states=states)
        for states in ("8bit", "compact")
    )
    assert all(torch.equal(left, right) for left, right in zip(plain, compact, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_biases_train_and_recomputed_layers_give_the_same_gradient(way: str) -> None:
    model, ids = _biased(), torch.randint(0, 128, (2, 12))
    expected = _values_gradients(model, ids, functions=False, targets="all")
    plain = _values_gradients(model, ids, functions=True, targets="all", gradient_way=way)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = _values_gradients(model, ids, functions=True, targets="all", gradient_way=way)
    for wanted, *found in zip(expected, plain, recomputed, strict=True):
        assert all(torch.allclose(wanted, each, atol=1e-12, rtol=0) for each in found)


def test_autocast_gives_the_gradients_of_the_hooks(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 128, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        hook, function = (_values_gradients(tiny_llama, ids, functions=on) for on in (False, True))
    for left, right in zip(hook, function, strict=True):
        torch.testing.assert_close(left, right, atol=2e-2 * float(left.abs().max()), rtol=0.05)


@pytest.mark.parametrize(("method", "dense_steps"), [("sift", [1]), ("random", []), ("spiel-ag", [1, 5])])
def test_dense_gradients_are_made_only_where_they_are_wanted(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, method: str, dense_steps: list[int]
) -> None:
    made: list[int] = []
    step = 0
    plain: Callable[..., Tensor] = LinearGradients.dense
    monkeypatch.setattr(LinearGradients, "dense", lambda *a: (made.append(step), plain(*a))[1])
    tuning = attach(tiny_llama, _spec(method=method))
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    tuning.begin_reselection(optimizer, 8)
    if method == "sift":
        tuning.begin_selection(1)
    for step in range(1, 9):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        _backward(tiny_llama, tuning, torch.randint(0, 128, (2, 12)))
        optimizer.step()
        optimizer.zero_grad()
        if tuning.spiel:
            tuning.spiel.end_step(step, 1.0)
    assert sorted(set(made)) == dense_steps
    tuning.probe = GradientProbe()
    _backward(tiny_llama, tuning, torch.randint(0, 128, (2, 12)))
    assert len(tuning.probe.tensors) == len(tuning.entries)


def test_layer_keeps_its_input_alone_for_the_backward(tiny_llama: LlamaForCausalLM) -> None:
    layer = tiny_llama.model.layers[0].mlp.up_proj
    attach(tiny_llama, _spec(method="random"))
    x = torch.randn(2, 5, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_shared_and_replaced_layers_are_left_to_the_hooks(tiny_llama: LlamaForCausalLM) -> None:
    first, second = (tiny_llama.model.layers[place].mlp for place in (0, 1))
    second.up_proj.weight = first.up_proj.weight
    plain = first.gate_proj.forward
    first.gate_proj.forward = lambda x: 2 * plain(x)
    expected = _values_gradients(tiny_llama, torch.arange(24).view(2, 12), functions=False)
    found = _values_gradients(tiny_llama, torch.arange(24).view(2, 12), functions=True)
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right)


def test_costs_of_a_run_stay_with_it(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose costs were measured anew goes on with the products, and so the bits, of the first session."""
    tuning = attach(tiny_llama, _spec(method="random"))
    state, share = tuning.state(), tuning.gradient_share
    tuning.detach()
    other = replace(DEFAULT_COSTS, multiply_s=1.0, narrow_s=1.0, gather_s=0.0, sampled_s=1.0, call_s=0.0)
    monkeypatch.setattr("engine.sparse.gradients.costs_for", lambda *_: other)
    again = attach(tiny_llama, _spec(method="random"))
    measured = again.gradient_share
    assert measured != share
    again.load_state({COSTS_KEY: state[COSTS_KEY][:4]})  # of a version that knew fewer
    assert again.gradient_share == measured
    again.load_state(state)
    assert again.gradient_share == share


def test_share_counts_hooked_weights_as_dense(tiny_llama: LlamaForCausalLM) -> None:
    tuning = attach(tiny_llama, _spec(method="random", gradient_way="sampled"), functions=False)
    assert tuning.gradient_share == 1.0
    tuning.detach()
    tuning = attach(tiny_llama, _spec(method="random", gradient_way="sampled"))
    assert tuning.gradient_share == pytest.approx(tuning.num_active / tuning.target_numel)


@pytest.mark.parametrize("way", [way for way in choices("gradient_way") if way != "auto"])
def test_gradients_of_candidates_keep_no_memory_beside_those_of_the_values(
    tiny_llama: LlamaForCausalLM, way: str
) -> None:
    tuning = attach(tiny_llama, _spec(method="spiel-ag", gradient_way=way))
    tuning.begin_reselection(build_optimizer(tuning.entries, tuning.spec), 4)
    assert tuning.spiel is not None
    for step in (1, 2):  # the first chooses the candidates, the second takes their gradient beside that of the values
        tuning.spiel.begin_step(step)
        for values in tuning.values:
            values.grad = None
        _backward(tiny_llama, tuning, torch.arange(24).view(2, 12))
    for values in tuning.values:
        assert values.grad is not None
        assert values.grad.untyped_storage().nbytes() == values.nbytes
