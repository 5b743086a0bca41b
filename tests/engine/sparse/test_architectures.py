"""Every family of models: the hook, the function where it applies, and a dense twin with a mask agree in fp64."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    LongformerModel,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optimizers import build_optimizer
from engine.spec import RunSpec

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
DENSITY, RATE, STEPS = 0.05, 1e-2, 4


def _roberta() -> PreTrainedModel:
    settings = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
    config = RobertaConfig(**settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoModelForMaskedLM.from_config(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)),
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(**SMALL)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SMALL), attn_implementation="eager"),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
        experts_implementation="eager",  # the grouped product knows no fp64
    ),
    "roberta": _roberta,
    "mamba": lambda: AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
}
LINEAR_ONLY = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "roberta",
    "mamba",
)  # the others hold Conv1D or stacked experts: hook only


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _batches() -> Tensor:
    return torch.randint(5, 128, (STEPS, 2, 10), generator=torch.Generator().manual_seed(3))


def _sparse(model: nn.Module, *, functions: bool) -> SparseTuning:
    spec = RunSpec(model="tiny", density=DENSITY, learning_rate=RATE)
    tuning = attach(model, spec, functions=functions)
    tuning.begin_selection(1)
    optimizer = build_optimizer(tuning.entries, spec)
    for ids in _batches():
        _loss(model, ids).backward()
        tuning.end_micro_step()
        optimizer.step()
        optimizer.zero_grad()
        tuning.write_back()
    return tuning


def _dense_twin(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Adam on masked changes of the same weights; return the weights after the last step."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    deltas = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(deltas.values(), lr=RATE, weight_decay=0.0)
    masks: dict[str, Tensor] = {}
    for ids in _batches():
        model.zero_grad()
        _loss(model, ids).backward()
        for name, parameter in parameters.items():
            if name not in masks:
                count = max(1, int(DENSITY * parameter.numel()))
                top = parameter.grad.abs().flatten().topk(count).indices
                masks[name] = torch.zeros(parameter.numel(), dtype=torch.float64).index_fill_(0, top, 1.0)
            deltas[name].grad = parameter.grad * masks[name].view_as(parameter)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(base[name] + deltas[name])
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("family", BUILDERS)
def test_sift_agrees_with_a_dense_twin(family: str) -> None:
    torch.manual_seed(1)
    model = BUILDERS[family]().double()
    twin = copy.deepcopy(model)
    tuning = _sparse(model, functions=False)
    weights = _dense_twin(twin, [entry.name for entry in tuning.entries])
    for entry in tuning.entries:
        torch.testing.assert_close(entry.weight.detach(), weights[entry.name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", LINEAR_ONLY)
def test_functions_agree_with_hooks(family: str) -> None:
    torch.manual_seed(1)
    model = BUILDERS[family]().double()
    twin = copy.deepcopy(model)
    for left, right in zip(_sparse(model, functions=False).entries, _sparse(twin, functions=True).entries, strict=True):
        assert torch.equal(left.placed, right.placed), left.name
        torch.testing.assert_close(left.values, right.values, atol=1e-12, rtol=0)


def test_queries_that_are_scaled_in_place_train() -> None:
    settings = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
    model = LongformerModel(LongformerConfig(**settings, attention_window=8, hidden_dropout_prob=0.0)).double()
    tuning = attach(model, RunSpec(model="tiny", method="random", density=DENSITY))
    model(input_ids=_batches()[0]).last_hidden_state.square().sum().backward()
    queries = [entry for entry in tuning.entries if entry.name.endswith("self.query.weight")]
    assert all(entry.values.grad is not None and entry.values.grad.any() for entry in queries)


def test_targets_are_the_linear_layers_of_each_family() -> None:
    found = {}
    for family, build in BUILDERS.items():
        tuning = attach(build(), RunSpec(model="tiny"))
        found[family] = {re.split(r"\.\d+\.", entry.name)[1].removesuffix(".weight") for entry in tuning.entries}
    seven = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert found["llama"] == found["qwen2"] == found["qwen3"] == found["gemma2"] == seven
    assert found["gpt2"] == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert len(found["roberta"]) == 6
    assert any("experts" in name for name in found["mixtral"])


@pytest.mark.parametrize("targets", [("*embed_tokens*",), ("lm_head",)])
def test_tied_embeddings_count_once_and_train(targets: tuple[str, ...]) -> None:
    model = BUILDERS["qwen3"]().double()
    spec = RunSpec(model="tiny", density=DENSITY, targets=targets)
    if targets == ("lm_head",):
        with pytest.raises(Exception, match="lm_head"):
            attach(model, spec)  # the tied weight goes by the name of the embedding
        return
    tuning = attach(model, spec)
    tuning.begin_selection(1)
    _loss(model, _batches()[0]).backward()
    assert len(tuning.entries) == 1
    assert tuning.entries[0].values.grad is not None
