"""Models of random weights that are made where they lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_models import config_folder, random_model, weights_bytes
from engine.planner.shape import read_shape
from engine.sparse.base_weight import NF4Weight, base_weights
from engine.spec import RunSpec

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "pad_token_id": None}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {"meta-llama/Llama-3.2-1B": SMALL, "Qwen/Qwen3-0.6B": SMALL, "google/gemma-3-1b-it": SMALL | GEMMA}


@pytest.mark.parametrize("model", MODELS)
def test_all_but_the_drawn_numbers_is_that_of_a_model_made_by_transformers(model: str) -> None:
    with config_folder(model, MODELS[model]) as folder:
        made = random_model(RunSpec(model=folder, dtype="float32"), CPU)
        known = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in known.named_parameters():
        ours = made.get_parameter(name)
        assert (ours.shape, ours.device) == (parameter.shape, CPU)
        assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.2), name
    assert made.lm_head.weight is made.model.embed_tokens.weight  # tied
    for name, buffer in known.named_buffers():
        assert torch.equal(made.get_buffer(name), buffer), name


def test_the_seed_decides_the_numbers_and_nothing_else_is_drawn() -> None:
    with config_folder("meta-llama/Llama-3.2-1B", SMALL) as folder:
        before = torch.get_rng_state()
        first, again, other = (
            random_model(RunSpec(model=folder, seed=seed, quantization="nf4"), CPU) for seed in (1, 1, 2)
        )
        assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [base_weights(model)[name] for model in (first, again, other)]
    assert all(isinstance(weight, NF4Weight) for weight in weights)
    assert torch.equal(weights[0].dense(), weights[1].dense())
    assert not torch.equal(weights[0].dense(), weights[2].dense())


def test_weights_take_what_the_shape_says(tmp_path: Path) -> None:
    with config_folder("Qwen/Qwen3-0.6B", SMALL) as folder:
        assert json.loads(Path(folder, "config.json").read_text())["hidden_size"] == 64
        found = weights_bytes(random_model(RunSpec(model=folder, dtype="bfloat16"), CPU))
        assert found == 2 * read_shape(folder).num_parameters
