"""Targets: which names each word and pattern means."""

import pytest

from engine.errors import TargetsError
from engine.targets import adapted_weights, layer_number, match_targets, num_active_of

NAMES = {
    "model.embed_tokens.weight": (80, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.gate.weight": (8, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (8, 64, 192),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (8, 192),
    "model.layers.10.self_attn.query_key_value.weight": (192, 64),
    "transformer.h.3.attn.c_attn.weight": (64, 192),
    "transformer.h.3.attn.c_proj.weight": (64, 64),
    "transformer.h.3.mlp.c_proj.weight": (96, 64),
    "lm_head.weight": (80, 64),
}


def test_linear_means_the_matrices_of_the_blocks() -> None:
    outside = {"embed_tokens", "input_layernorm", "lm_head", "bias", "gate_up_proj_bias"}
    assert match_targets(NAMES, "linear") == [name for name in NAMES if outside.isdisjoint(name.split("."))]


def test_attention_means_its_projections_fused_or_not() -> None:
    found = {name.split(".")[-2] for name in match_targets(NAMES, "attention")}
    assert found == {"q_proj", "o_proj", "query_key_value", "c_attn", "c_proj"}
    assert "transformer.h.3.mlp.c_proj.weight" not in match_targets(NAMES, "attention")


ENCODERS = {
    "bert": (
        "attention.self.query",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "distilbert": ("attention.q_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_layers_of_encoders_are_known_by_their_names(family: str) -> None:
    layers = [f"{family}.encoder.layer.0.{layer}" for layer in ENCODERS[family]]
    names = {f"{layer}.weight": (64, 64) for layer in layers} | {"classifier.dense.weight": (64, 64)}
    assert match_targets(names, "linear") == [f"{layer}.weight" for layer in layers]
    assert match_targets(names, "attention") == [f"{layer}.weight" for layer in layers[:3]]
    assert adapted_weights(names, "linear", "ia3") == [f"{layers[place]}.weight" for place in (1, 4)]


def test_all_means_every_parameter() -> None:
    assert match_targets(NAMES, "all") == list(NAMES)


def test_a_pattern_is_a_part_of_a_name_or_a_glob() -> None:
    assert match_targets(NAMES, ("o_proj", "model.layers.1?.*")) == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.10.self_attn.query_key_value.weight",
    ]


def test_what_matches_nothing_names_real_parameters() -> None:
    with pytest.raises(TargetsError, match=r"the pattern 'up_proj' matches no parameter .* like model\.layers\.0"):
        match_targets(NAMES, ("o_proj", "up_proj"))
    with pytest.raises(TargetsError, match=r"targets 'linear' match no weight .* like wte\.weight\."):
        match_targets({"wte.weight": (8, 4)}, "linear")
    with pytest.raises(TargetsError, match=r"targets \[\] match no weight"):
        match_targets(NAMES, ())


def test_counts_follow_density_or_the_number_asked_for() -> None:
    numels = {"a": 1000, "b": 50, "c": 3}
    assert num_active_of(numels, 0.05) == {"a": 50, "b": 2, "c": 1}
    assert num_active_of(numels, 0.05, num_trainable=100) == {"a": 94, "b": 4, "c": 1}
    assert num_active_of(numels, 0.05, num_trainable=10**6) == numels


def test_the_block_of_a_name_is_its_first_number() -> None:
    assert [layer_number(name) for name in ("model.layers.10.x.2.weight", "lm_head.weight")] == [10, None]
