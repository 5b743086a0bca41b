"""The trace on the meta device against the same count over real tensors of a real run on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.hardware import Device
from engine.models import load_model
from engine.planner.ledger import Figures, add_up
from engine.planner.trace import count_real, trace
from engine.spec import RunSpec
from engine.units import GIB

CPU = Device("cpu", "CPU", 16 * GIB, 16 * GIB)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "tie_word_embeddings": True},
    "gemma3_text": {**SMALL, "sliding_window": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 256},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
METHODS = ("sift", "spiel-ag", "spiel-ma", "lora", "full")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Write a small model of a family and return its folder."""

    def write(family: str) -> str:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **FAMILIES[family])
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return write


def _both(spec: RunSpec, padded: bool | None = None) -> tuple[Figures, Figures]:
    real = add_up(count_real(load_model(spec, torch.device("cpu")), spec, padded=padded), 0, host_apart=False)
    return trace(spec, CPU, padded=padded, rounding=0), real


def _spec(model: str, **fields: Any) -> RunSpec:
    values = {"sequence_length": 128, "density": 0.05, "gradient_accumulation": 1, "probe_interval": 0, **fields}
    return RunSpec(model=model, **{"gradient_way": "dense", **values})


def _assert_equal(traced: Figures, real: Figures) -> None:
    assert traced.peak.total == pytest.approx(real.peak.total, rel=1e-3)
    for part, num_bytes in real.peak.parts.items():
        assert traced.peak.parts[part] == pytest.approx(num_bytes, abs=1e-3 * real.peak.total), part
    assert traced.after_forward.total == pytest.approx(real.after_forward.total, rel=1e-2)


@pytest.mark.parametrize("method", ["sift", "spiel-ag"])
def test_ways_that_hang_on_numbers_take_what_the_trace_says_at_most(method: str, folder: Any) -> None:
    traced, real = _both(_spec(folder("llama"), method=method, gradient_way="compaction"))
    assert real.peak.total <= 1.01 * traced.peak.total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_is_a_real_step(family: str, method: str, checkpointing: bool, folder: Any) -> None:
    spec = _spec(folder(family), method=method, gradient_checkpointing=checkpointing)
    _assert_equal(*_both(spec))
