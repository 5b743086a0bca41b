"""Shapes: exact counts from headers and configs, and a sentence for what cannot be read."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from engine.errors import HubUnreachableError, ModelError
from engine.planner.families import WITHOUT_FUSED_ATTENTION
from engine.planner.shape import has_weights, read_shape, require_weights, resolve_model

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "smollm3",
    "granite",
    "phi",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
)
WITH_A_DECODER = {"bigbird_pegasus", "mvp", "prophetnet", "t5gemma", "trocr"}  # beside an encoder: not trained here
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 80,
    "pad_token_id": None,
}


def test_llama_7b_has_6738415616_parameters(config_folder: Callable[..., str]) -> None:
    assert read_shape(config_folder()).num_parameters == 6_738_415_616


def test_real_headers_give_the_hand_counted_parameters(shared: Path) -> None:
    shape = read_shape(str(shared / "models" / "stories260k"))
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172 + 2 * 64  # q, o; k, v; gate, up, down; two norms
    assert shape.num_parameters == 512 * 64 + 5 * block + 64 == 260_032
    assert shape.head == shape.embedding == "model.embed_tokens.weight"


def test_a_config_gives_the_same_tensors_as_the_weights(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    bare, whole = read_shape(str(tmp_path)), read_shape(str(model_folder))
    assert dict(bare.tensors) == dict(whole.tensors)
    assert (bare.dtype, whole.dtype) == ("", "F32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_gives_the_parameters_of_the_model_class(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **SMALL)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(read_shape(str(tmp_path)).tensors) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_stored_weights_give_the_parameters_of_the_model_class(family: str, tmp_path: Path) -> None:
    experts = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 32} if "m" in family[-5:] else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **experts))
    model.save_pretrained(tmp_path)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(read_shape(str(tmp_path)).tensors) == expected


ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 80,
}
DISTIL = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 80}


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert", "llama"])
def test_a_config_gives_the_parameters_of_the_classifier_class(family: str, tmp_path: Path) -> None:
    sizes = {"distilbert": DISTIL, "llama": SMALL}.get(family, ENCODER)
    config = AutoConfig.for_model(family, **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    shape = read_shape(str(tmp_path), task="classification")
    assert dict(shape.tensors) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    heads = [p.numel() for name, p in model.named_parameters() if name.split(".")[0] not in (model.base_model_prefix,)]
    assert shape.dense_numel == sum(heads)


def test_an_index_of_shards_is_read_whole(config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder(num_hidden_layers=1))
    parts = {"a.safetensors": {"x.0.weight": torch.zeros(2, 3)}, "b.safetensors": {"x.10.weight": torch.zeros(4)}}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_shape(str(folder)).num_parameters == 10
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 'b\.safetensors', one of the 2 weight files"):
        read_shape(str(folder))


def test_weights_that_are_stored_quantised_are_refused(config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    assert read_shape(str(folder)).num_parameters == 6_738_415_616  # the sizes of what they were made from
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 1, dtype=torch.uint8)}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"are stored quantised \(bitsandbytes\), .* quantization=nf4"):
        read_shape(str(folder))


def test_a_stored_copy_of_a_tied_head_counts_once(config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder(tie_word_embeddings=True))
    embedding = torch.zeros(8, 4)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(tensors, folder / "model.safetensors")
    shape = read_shape(str(folder))
    assert (shape.num_parameters, shape.tied) == (32, True)


def test_a_changed_file_is_read_again(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    before = read_shape(folder)
    assert read_shape(folder) is before
    os.utime(Path(config_folder(num_hidden_layers=16)) / "config.json", ns=(1, 1))
    assert read_shape(folder).layers == 16


def test_a_folder_without_weights_plans_but_does_not_run(config_folder: Callable[..., str], model_folder: Path) -> None:
    folder = config_folder()
    assert not has_weights(Path(folder))
    assert require_weights(str(model_folder)) == model_folder
    with pytest.raises(ModelError, match=r"has a config\.json but no weights \(\*\.safetensors\)"):
        require_weights(folder)


def test_what_is_no_model_says_why(tmp_path: Path, config_folder: Callable[..., str]) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="'no such/model/here' is no folder on this computer, no bundled model"):
        resolve_model("no such/model/here")
    with pytest.raises(ModelError, match="model_revision 'main' is for models on the Hub"):
        resolve_model(config_folder(), "main")
    with pytest.raises(ModelError, match="no usable num_hidden_layers"):
        read_shape(config_folder(num_hidden_layers=None))
    with pytest.raises(ModelError, match="no usable head_dim"):  # no class of transformers could be built of it
        read_shape(config_folder(num_attention_heads=7))
    with pytest.raises(ModelError, match="has an encoder and a decoder"):
        read_shape(config_folder(model_type="t5", is_encoder_decoder=True))
    assert resolve_model("owner/name") == "owner/name"


def test_a_config_may_leave_out_what_its_class_knows(tmp_path: Path, config_folder: Callable[..., str]) -> None:
    config = json.loads(AutoConfig.for_model("bert").to_json_string(use_diff=False))
    shapes = []
    for name, body in (("whole", config), ("short", {**config, "max_position_embeddings": None})):
        folder = tmp_path / name
        folder.mkdir()
        kept = {key: value for key, value in body.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        shapes.append(read_shape(str(folder), task="classification"))
    assert dict(shapes[0].tensors) == dict(shapes[1].tensors)
    mamba = read_shape(config_folder(model_type="mamba", num_attention_heads=None, num_key_value_heads=None))
    assert mamba.heads * mamba.head_dim == mamba.hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_left_out_is_that_of_the_class(family: str, tmp_path: Path) -> None:
    left_out = ("intermediate_size", "num_key_value_heads", "head_dim")
    sizes = {name: size for name, size in SMALL.items() if name not in left_out}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shape = read_shape(str(tmp_path))
    assert dict(shape.tensors) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shape.experts_per_token == getattr(model.config, "num_experts_per_tok", 0)


def test_the_width_of_bloom_may_be_called_n_embed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bloom", "n_embed": 48, "n_layer": 2, "n_head": 4, "vocab_size": 80}),
        encoding="utf-8",
    )
    assert read_shape(str(tmp_path)).hidden == AutoConfig.from_pretrained(tmp_path).hidden_size == 48


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_an_output_layer_is_tied_where_the_config_says_so(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": family, **SMALL, "tie_word_embeddings": True}), encoding="utf-8"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert read_shape(str(tmp_path)).num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["intermediate_size", "max_position_embeddings", "type_vocab_size"])
def test_an_encoder_without_a_number_says_which(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "roberta", **ENCODER, name: None}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match=f"has no usable {name}"):
        read_shape(str(tmp_path), task="classification")


def test_families_without_fused_attention_are_those_whose_classes_have_none() -> None:
    found = set()
    for classes in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
        for config, model in classes.items():
            kind = model[0] if isinstance(model, tuple) else model
            if not kind._supports_sdpa:
                found.add(config.model_type)
    assert found - WITH_A_DECODER == WITHOUT_FUSED_ATTENTION


@pytest.mark.parametrize("content", [b"", b"{", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_torn_weight_file_is_an_error(content: bytes, config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        read_shape(str(folder))


def test_a_weight_file_cut_short_is_an_error(config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder())
    save_file({"model.embed_tokens.weight": torch.zeros(64, 8)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        read_shape(str(folder))


def test_an_unreadable_config_is_an_error(config_folder: Callable[..., str]) -> None:
    folder = Path(config_folder())
    (folder / "config.json").write_text("[1")
    with pytest.raises(ModelError, match="is not a readable"):
        read_shape(str(folder))


def test_a_hub_model_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    with pytest.raises(HubUnreachableError, match="'owner/not-in-any-cache' is not on this computer"):
        read_shape("owner/not-in-any-cache")


def test_a_hub_model_in_the_cache_is_read_offline(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(model_folder)
    assert dict(read_shape("owner/cached").tensors) == dict(read_shape(str(model_folder)).tensors)
