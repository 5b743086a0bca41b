"""Sparse tuning against a dense twin: the same model with all gradients, a mask, and torch's AdamW."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from engine.errors import TargetsError
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optim import clip_gradient
from engine.sparse.optimizers import build_optimizer
from engine.sparse.probe import GradientProbe
from engine.spec import RunSpec


def _spec(**fields: object) -> RunSpec:
    return RunSpec(model="tiny", density=0.05, learning_rate=1e-2, weight_decay=0.1, **fields)


def _backward(model: nn.Module, ids: Tensor, divisor: int = 1) -> None:
    (model(input_ids=ids, labels=ids).loss / divisor).backward()


def _step(tuning: SparseTuning, optimizer: torch.optim.Optimizer) -> None:
    clip_gradient(tuning.values, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    tuning.write_back()


def _dense_twin_step(twin: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One AdamW step on masked changes: the gradient outside the mask is zero, clipped as a whole."""
    deltas = optimizer.param_groups[0]["params"]
    parameters = dict(twin.named_parameters())
    for (name, mask), delta in zip(masks.items(), deltas, strict=True):
        delta.grad = parameters[name].grad * mask
        parameters[name].grad = None
    torch.nn.utils.clip_grad_norm_(deltas, 0.5)
    optimizer.step()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sift_matches_a_dense_masked_reference(tiny_llama: LlamaForCausalLM, accumulation: int) -> None:
    model, twin = tiny_llama.double(), copy.deepcopy(tiny_llama).double()
    batches = torch.randint(0, 128, (6, accumulation, 2, 12))
    tuning = attach(model, _spec())
    tuning.begin_selection(accumulation)
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    parameters = {name: dict(twin.named_parameters())[name] for name in [entry.name for entry in tuning.entries]}
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    deltas = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in parameters.items()}
    reference = torch.optim.AdamW(deltas.values(), lr=1e-2, weight_decay=0.1)
    masks: dict[str, Tensor] = {}
    for micro_batches in batches:
        for ids in micro_batches:
            _backward(model, ids, accumulation)
            tuning.end_micro_step()
            _backward(twin, ids, accumulation)
        if not masks:
            for name, parameter in parameters.items():
                count = int(0.05 * parameter.numel())
                masks[name] = torch.zeros(parameter.numel(), dtype=torch.float64)
                masks[name][parameter.grad.abs().flatten().topk(count).indices] = 1.0
                masks[name] = masks[name].view_as(parameter)
        _step(tuning, optimizer)
        _dense_twin_step(twin, masks, reference)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(base[name] + deltas[name])
    for entry in tuning.entries:
        torch.testing.assert_close(entry.weight, parameters[entry.name], atol=1e-12, rtol=0)


def test_only_targets_change_and_detach_restores_all(tiny_llama: LlamaForCausalLM) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    tuning = attach(tiny_llama, _spec(targets="attention"))
    tuning.begin_selection(1)
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    for _ in range(3):
        _backward(tiny_llama, torch.randint(0, 128, (2, 12)))
        tuning.end_micro_step()
        _step(tuning, optimizer)
    changed = {name for name, tensor in tiny_llama.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {entry.name for entry in tuning.entries}
    tuning.detach()
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny_llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_no_dense_gradient_outlives_the_backward(tiny_llama: LlamaForCausalLM) -> None:
    tuning = attach(tiny_llama, _spec())
    tuning.begin_selection(1)
    _backward(tiny_llama, torch.randint(0, 128, (2, 12)))
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert all(values.grad.shape == (len(values),) for values in tuning.values)


def test_checkpointed_backward_gives_the_same_gradient(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 128, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuning = attach(tiny_llama.train(), _spec(method="random"))
        _backward(tiny_llama, ids)
        gradients.append([values.grad.clone() for values in tuning.values])
        tuning.detach()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_tied_embedding_is_one_target(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    tuning = attach(tiny_llama, _spec(targets=("*embed_tokens*",)))
    tuning.begin_selection(1)
    ids = torch.randint(0, 128, (2, 12))
    _backward(tiny_llama, ids)
    assert len(tuning.entries) == 1
    assert tuning.entries[0].values.grad.abs().min() > 0


def test_unknown_targets_name_real_parameters(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(TargetsError, match=r"'query'.*q_proj"):
        attach(tiny_llama, _spec(targets=("query",)))


def test_first_gradients_selection_is_the_best_choice_of_its_own_batch(tiny_llama: LlamaForCausalLM) -> None:
    tuning = attach(tiny_llama, _spec())
    tuning.begin_selection(1)
    tuning.probe = GradientProbe()
    _backward(tiny_llama, torch.randint(0, 128, (2, 12)))
    shares = tuning.probe.overall
    assert shares.selected == pytest.approx(shares.best)
    assert 0.01 < shares.top < shares.best < 1.0


def test_random_choice_catches_less_gradient_than_the_best(tiny_llama: LlamaForCausalLM) -> None:
    tuning = attach(tiny_llama, _spec(method="random"))
    tuning.probe = GradientProbe()
    _backward(tiny_llama, torch.randint(0, 128, (2, 12)))
    assert tuning.probe.overall.selected < 0.5 * tuning.probe.overall.best


class _WithUnused(nn.Module):
    """A Llama and a layer that no gradient reaches."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = inner
        self.unused = nn.Linear(8, 8)

    def forward(self, **inputs: Tensor) -> object:
        return self.inner(**inputs)


def test_weight_without_gradient_stays_as_it_is(tiny_llama: LlamaForCausalLM) -> None:
    model = _WithUnused(tiny_llama)
    base = model.unused.weight.detach().clone()
    tuning = attach(model, _spec(targets="all"))
    tuning.begin_selection(1)
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    for _ in range(2):
        _backward(model, torch.randint(0, 128, (2, 12)))
        tuning.end_micro_step()
        _step(tuning, optimizer)
    assert torch.equal(model.unused.weight, base)
    assert "unused.weight" not in tuning.delta().tensors
    assert "unused.weight.indices" not in tuning.state()


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_magnitude_chooses_exactly_also_beside_outliers_in_bf16(tiny_llama: LlamaForCausalLM, order: str) -> None:
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] = 100.0
    tuning = attach(tiny_llama.bfloat16(), _spec(method="magnitude", magnitude=order))
    entry = next(entry for entry in tuning.entries if entry.name.endswith("0.mlp.up_proj.weight"))
    sizes = weight.detach().abs().flatten()
    expected = sizes.topk(entry.num_active, largest=order == "largest").values.sort().values
    assert torch.equal(sizes[entry.placed.long()].sort().values, expected)
