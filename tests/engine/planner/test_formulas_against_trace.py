"""Closed forms against traces of the real model classes; `python -m benchmarks.planner_formulas` has more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from engine.hardware import Device
from engine.planner.encoders import ENCODERS
from engine.planner.estimate import estimate
from engine.planner.families import EXACT_FAMILIES
from engine.planner.recompute import KNOWN_FAMILIES
from engine.planner.shape import read_shape
from engine.planner.trace import trace
from engine.planner.trace_worker import trace_spec
from engine.sparse.blockwise import quantize
from engine.spec import RunSpec
from engine.units import GIB

CARD = Device("cuda:0", "a card", 80 * GIB, 80 * GIB)
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
}
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 256},
    "gemma3_text": {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {"n_positions": 1024, "intermediate_size": 1024, "num_key_value_heads": 8},
    "gpt_neox": {"num_key_value_heads": 8},
    "phi": {"num_key_value_heads": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    **{family: {"num_key_value_heads": 8} for family in ("bert", "roberta", "xlm-roberta")},
    "distilbert": {"dim": 256, "hidden_dim": 704, "n_layers": 3, "n_heads": 8, "num_key_value_heads": 8},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"targets": "all"},
    "recomputed": {"attention": "eager", "gradient_checkpointing": True, "micro_batch_size": 2, "chunked_loss": True},
    "compact": {"optimizer_states": "compact", "density": 0.1, "sequence_length": 64},
    "adapters": {"method": "lora", "dtype": "float32", "micro_batch_size": 2},
}
GROWN: dict[str, Any] = {"gradient_checkpointing": True, "chunked_loss": True, "sequence_length": 128, "density": 0.1}


ALONE: dict[str, Any] = {"chunked_loss": True, "sequence_length": 128}
LEAN: dict[str, dict[str, Any]] = {
    "elementwise": {"recompute": "elementwise", "gradient_way": "dense"},
    "mlp": {"recompute": "mlp", "recompute_blocks": 2, "chunked_loss": True, "targets": "attention"},
    "blocks": {"recompute": "blocks", "recompute_blocks": 2, "method": "spiel-ma", "quantization": "nf4"},
}


def _errors(folder: Path, family: str, setting: str, **fields: Any) -> tuple[bool, float]:
    """Return whether a plan is said to be exact, and by what share its peak differs from the trace's."""
    AutoConfig.for_model(family, **CONFIG | OF_ITS_OWN.get(family, {})).save_pretrained(folder)
    values = {"dtype": "bfloat16", "sequence_length": 512, "gradient_accumulation": 1, "probe_interval": 0}
    spec = RunSpec(model=str(folder), **{"density": 0.02, **values, **(SETTINGS | LEAN)[setting], **fields})
    plan = estimate(spec, read_shape(str(folder), task=spec.task), CARD)
    planned = plan.peak_bytes - plan.parts["workspace"] - plan.parts["context"]
    return plan.exact, planned / trace(spec, CARD, rounding=0).peak.total - 1


@pytest.fixture(autouse=True)
def _code_tables() -> None:
    """Make the tables of 8-bit codes, a MiB that all traces of a process share: the first one would count it."""
    for signed in (True, False):
        quantize(torch.zeros(1, device="meta"), signed=signed)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", sorted(EXACT_FAMILIES))
def test_the_closed_forms_are_within_1_percent_of_the_trace(family: str, setting: str, tmp_path: Path) -> None:
    exact, error = _errors(tmp_path, family, setting)
    assert exact
    assert abs(error) <= 0.01


@pytest.mark.parametrize("setting", LEAN)
@pytest.mark.parametrize("family", sorted(EXACT_FAMILIES & KNOWN_FAMILIES))
def test_so_they_are_for_blocks_that_keep_little(family: str, setting: str, tmp_path: Path) -> None:
    exact, error = _errors(tmp_path, family, setting)
    assert exact
    assert abs(error) <= 0.01


@pytest.mark.parametrize("setting", ["plain", "recomputed", "adapters"])
@pytest.mark.parametrize("family", sorted({*ENCODERS, "llama", "gpt2"}))
def test_so_are_those_of_classifiers(family: str, setting: str, tmp_path: Path) -> None:
    exact, error = _errors(tmp_path, family, setting, task="classification")
    assert exact
    assert abs(error) <= 0.01


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma"])
def test_so_is_what_growing_takes(method: str, accumulation: int, tmp_path: Path) -> None:
    _, error = _errors(tmp_path, "llama", "plain", method=method, gradient_accumulation=accumulation, **GROWN)
    assert abs(error) <= 0.01


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}, {"method": "spiel-ma"}])
def test_what_is_reserved_is_within_5_percent_of_the_allocator(
    fields: dict[str, Any], config_folder: Callable[..., str]
) -> None:
    folder = config_folder()
    spec = RunSpec(
        model=folder, sequence_length=1024, density=0.01, probe_interval=0, gradient_accumulation=1, **fields
    )
    plan, found = estimate(spec, read_shape(folder), CARD), trace_spec(spec, CARD)
    for planned, replayed in (
        (plan.reserved_bytes, found.reserved_bytes),
        (plan.minimum_bytes, found.minimum_bytes),
    ):
        assert planned - plan.parts["workspace"] == pytest.approx(replayed, rel=0.05)


@pytest.mark.parametrize("method", ["random", "spiel-ag"])
def test_so_are_gradients_by_sampled_products(method: str, tmp_path: Path) -> None:
    fields = {"method": method, "gradient_way": "sampled", "targets": "attention", "density": 0.5, **ALONE}
    _, error = _errors(tmp_path, "llama", "plain", **fields)
    assert abs(error) <= 0.01


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_trained_biases_let_the_first_block_keep_its_share(family: str, tmp_path: Path) -> None:
    """Little is kept then, and the forward of the last block may hold the most."""
    _, error = _errors(tmp_path, family, "plain", **{**ALONE, "targets": ("*bias*",), "task": "classification"})
    assert abs(error) <= 0.03
