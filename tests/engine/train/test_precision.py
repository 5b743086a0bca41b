"""Small updates over 16-bit and 4-bit bases: no value stands still, and the weights hold the rounded sum."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from engine.models import load_model
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.base_weight import NF4Weight
from engine.sparse.spiel import Reselected
from engine.spec import RunSpec

IDS = torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(1))
Visit = Callable[[SparseTuning], None]


def _spec(method: str, **fields: Any) -> RunSpec:
    values = {"density": 0.05, "learning_rate": 1e-5, "period": 8, "estimation_steps": 3, **fields}
    return RunSpec(model="tiny", method=method, gradient_accumulation=1, **values)


def _train(
    model: nn.Module, spec: RunSpec, steps: int, visit: Visit = lambda _: None
) -> tuple[SparseTuning, list[float], list[Reselected], torch.optim.Optimizer]:
    tuning, losses, reselected = attach(model, spec), [], []
    optimizer = tuning.make_optimizer()
    tuning.begin_reselection(optimizer, steps)
    if spec.method == "sift":
        tuning.begin_selection(1)
    for step in range(1, steps + 1):
        if tuning.spiel:
            tuning.spiel.begin_step(step)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        tuning.end_micro_step()
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
        if tuning.spiel and (done := tuning.spiel.end_step(step, 1.0)):
            reselected.append(done)
        losses.append(float(loss.detach()))
        visit(tuning)
    return tuning, losses, reselected, optimizer


def _assert_holds_rounded_sums(model: nn.Module, tuning: SparseTuning, base: dict[str, Tensor]) -> None:
    held = {entry.name: entry for entry in tuning.entries}
    for name, tensor in model.state_dict().items():
        expected = base[name].clone().flatten()
        if name in held:
            places = held[name].placed.long()
            expected[places] = (expected[places].float() + held[name].read_values()).to(tensor.dtype)
        assert torch.equal(tensor.flatten(), expected), name


@pytest.mark.parametrize(
    ("method", "states"),
    [
        *((method, "float32") for method in ("sift", "random", "spiel-ag", "spiel-ma")),
        *((method, "compact") for method in ("sift", "random", "spiel-ag")),
    ],
)
def test_every_value_over_bf16_moves_at_a_rate_that_bf16_would_round_away(
    tiny_llama: LlamaForCausalLM, method: str, states: str
) -> None:
    model = tiny_llama.bfloat16()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placed: list[dict[str, Tensor]] = []
    tuning, *_ = _train(
        model,
        _spec(method, optimizer_states=states),
        20,
        lambda now: placed.append({each.name: each.placed.clone() for each in now.entries}),
    )
    for entry in tuning.entries:
        stayed = torch.isin(entry.placed, placed[-2][entry.name])  # SpIEL's newest begin at zero
        assert stayed.float().mean() > 0.7
        assert entry.values.dtype == torch.float32
        assert bool((entry.read_values()[stayed] != 0).all()), entry.name
    _assert_holds_rounded_sums(model, tuning, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sift_learns_over_16_bit_weights(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = tiny_llama.to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning, losses, *_ = _train(model, _spec("sift", learning_rate=5e-3), 20)
    assert losses[-1] < losses[0] - 0.3
    _assert_holds_rounded_sums(model, tuning, base)


@pytest.mark.parametrize("method", ["sift", "spiel-ag"])
@pytest.mark.parametrize("states", ["8bit", "compact"])
def test_a_delta_of_either_states_is_learnt_removed_and_applied(
    tiny_llama: LlamaForCausalLM, method: str, states: str
) -> None:
    """Without it the model is the base bit for bit, with it again what training left."""
    model = tiny_llama.bfloat16()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning, losses, *_ = _train(model, _spec(method, learning_rate=5e-3, optimizer_states=states, density=0.6), 20)
    assert losses[-1] < losses[0] - 0.3
    _assert_holds_rounded_sums(model, tuning, base)
    delta = tuning.delta()
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning.detach()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    delta.apply(model)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("quantization", "states"), [("none", "8bit"), ("nf4", "8bit"), ("nf4", "compact")])
def test_spiel_ag_learns_and_reselects_with_8_bit_states_in_main_memory(
    model_folder: Path, quantization: str, states: str
) -> None:
    fields = {"quantization": quantization, "optimizer_states": states, "offload_states": True}
    spec = _spec("spiel-ag", density=0.6, learning_rate=5e-3, **fields)
    model = load_model(spec.model_copy(update={"model": str(model_folder)}), torch.device("cpu"))
    tuning, losses, reselected, optimizer = _train(model, spec, 12)
    assert losses[-1] < losses[0] - 0.3
    assert [done.replaced > 0 for done in reselected] == [True, True]
    assert any(isinstance(entry.weight, NF4Weight) for entry in tuning.entries) == (quantization == "nf4")
    coded = [values for values in tuning.values if values.numel() >= 4096]
    assert coded
    assert all(optimizer.state[values]["exp_avg"].dtype == torch.uint8 for values in coded)
    assert all(1 <= int(age) <= 12 for values in coded for age in optimizer.state[values]["age"].unique())


@pytest.mark.parametrize(
    "make",
    [
        lambda values: torch.optim.SGD(values, lr=1.0, momentum=0.9, nesterov=True),
        lambda values: torch.optim.AdamW(values, lr=5e-3, amsgrad=True, foreach=True),
        lambda values: torch.optim.RMSprop(values, lr=5e-3, centered=True),
        lambda values: torch.optim.Adafactor(values, lr=5.0),
        lambda values: torch.optim.LBFGS(values, lr=0.5),
    ],
    ids=["sgd", "adamw", "rmsprop", "adafactor", "lbfgs"],
)
def test_values_work_in_any_optimizer_of_torch(
    tiny_llama: LlamaForCausalLM, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    model = tiny_llama.bfloat16()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning = attach(model, _spec("random"))
    optimizer, losses = make(tuning.values), []

    def closure() -> Tensor:
        tuning.write_back()
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        tuning.end_micro_step()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(12):
        optimizer.step(closure)
    tuning.write_back()
    assert losses[-1] < losses[0] - 0.05
    _assert_holds_rounded_sums(model, tuning, base)
