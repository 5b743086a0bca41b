"""Loading a base model: what of it is loaded, under which names."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from engine.models import load_model
from engine.planner.shape import read_shape
from engine.spec import RunSpec

IDS = torch.arange(24).view(2, 12)


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


@torch.no_grad()
def test_language_model_is_taken_out_of_one_that_also_sees(
    seeing: tuple[Path, Gemma3ForConditionalGeneration],
) -> None:
    folder, whole = seeing
    model = load_model(RunSpec(model=str(folder), dtype="float32"), torch.device("cpu"))
    assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    assert model.train()(input_ids=IDS).logits.shape == (2, 12, 160)  # the whole one asks for image positions here
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(read_shape(str(folder), None).tensors) == tensors
