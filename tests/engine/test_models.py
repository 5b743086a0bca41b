"""Loading a base model: what of it is loaded, under which names."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

from engine.errors import ModelError
from engine.models import load_model, load_tokenizer
from engine.planner.shape import read_shape
from engine.spec import RunSpec

IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def test_language_model_is_taken_out_of_one_that_also_sees(
    seeing: tuple[Path, Gemma3ForConditionalGeneration],
) -> None:
    folder, whole = seeing
    model = load_model(RunSpec(model=str(folder), dtype="float32"), torch.device("cpu"))
    assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    assert model.train()(input_ids=IDS).logits.shape == (2, 12, 160)  # the whole one asks for image positions here
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model.eval().save_pretrained(folder / "alone")
    again = AutoModelForCausalLM.from_pretrained(folder / "alone").eval()
    assert torch.equal(again(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    assert dict(read_shape(str(folder), None).tensors) == tensors


@pytest.mark.parametrize("family", ["gpt2", "bert", "qwen2"])
def test_a_folder_without_a_tokenizer_has_none_not_one_of_no_words(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded"):
        load_tokenizer(RunSpec(model=str(tmp_path)))
