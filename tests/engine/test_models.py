"""Loading a base model: what of it is loaded, under which names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from engine.errors import DeviceError, ModelError
from engine.hardware import Gpu
from engine.models import device_of, load_classifier, load_model, load_tokenizer
from engine.planner.encoders import is_head
from engine.planner.shape import read_shape
from engine.spec import RunSpec
from engine.units import GIB

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


@pytest.mark.parametrize("labels", [(), ("no", "yes"), ("a", "b", "c")])
def test_a_classifier_of_two_unnamed_labels_takes_the_labels_of_its_run(
    encoder_folder: Path, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    shutil.copytree(encoder_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "single_label_classification"}))
    spec = RunSpec(model=str(tmp_path), task="classification", dtype="float32")
    model, _ = load_classifier(spec, torch.device("cpu"), labels)
    assert model(input_ids=IDS % 8).logits.shape == (2, len(labels) or 1)
    assert model.config.problem_type == ("single_label_classification" if labels else "regression")


def test_the_head_of_modernbert_stays_dense_over_nf4(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ModernBertConfig(**sizes, num_attention_heads=4, pad_token_id=0)
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path)
    spec = RunSpec(model=str(tmp_path), task="classification", quantization="nf4")
    model, head = load_classifier(spec, torch.device("cpu"), ("no", "yes"))
    assert set(head) == {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"}
    assert all(model.get_parameter(name).is_floating_point() and is_head(name) for name in head)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_card_that_this_pytorch_cannot_use_is_said_in_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, None, 89)
    monkeypatch.setattr("engine.hardware.list_gpus", lambda: [card])  # the driver's answer
    with pytest.raises(DeviceError, match=r"cannot use RTX 4090\. It lacks CUDA: .* or set device=cpu"):
        device_of(name)
    assert device_of("cpu") == torch.device("cpu")
