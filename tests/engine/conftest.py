"""Fixtures of the engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from engine.tracer import Tracer


@pytest.fixture(scope="session")
def tracer() -> Iterator[Tracer]:
    """A tracer whose process all tests of the group `tracer` share."""
    with Tracer() as asked:
        yield asked


@pytest.fixture
def seeing(tmp_path: Path) -> tuple[Path, Gemma3ForConditionalGeneration]:
    """A tiny Gemma 3 with its vision tower, in a folder as it comes."""
    text = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config={**text, **heads}, vision_config={**vision, **sizes}, image_token_index=159)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing", model
