"""Blocks computed anew: refused, in words, where a family has none that could be."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from engine.errors import ModelError
from engine.spec import RunSpec
from engine.train.checkpointing import checkpoint_blocks

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing must be false .* got true. Set gradient_checkpoint"),
        ({"recompute": "blocks"}, "recompute must be nothing .* got 'blocks'. Set recompute=nothing."),
        ({"recompute": "blocks", "recompute_blocks": 1}, "recompute must be nothing for models of the family 'openai-"),
    ],
)
def test_what_transformers_cannot_compute_anew_is_refused(fields: dict[str, Any], said: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **SMALL))
    with pytest.raises(ModelError, match=said):
        checkpoint_blocks(model, RunSpec(model="tiny", **fields))
    checkpoint_blocks(model, RunSpec(model="tiny"))
