"""Every preset loads, and plans without the Hub, on the card it is meant for."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.hardware import Device
from engine.planner.estimate import estimate
from engine.planner.plan import make_plan
from engine.planner.shape import read_shape
from engine.presets import known_config, list_presets, load_preset
from engine.spec_io import load_values
from engine.units import GIB

CARD = Device("cuda:0", "a 24 GB card", 24 * GIB, 24 * GIB)
# Counts that the makers of the models publish.
PARAMETERS = {
    "sift-llama-7b-alpaca": 6_738_415_616,
    "sift-llama-13b-alpaca": 13_015_864_320,
    "sift-llama-33b-alpaca": 32_528_943_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "smollm2-135m": 134_515_008,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # Of the language model, with the 64 tokens for images that the whole model adds to the vocabulary.
    "gemma-3-4b": 3_880_099_328 + 64 * 2560,
    "gemma-3-12b": 11_765_788_416 + 64 * 3840,
}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize("name", list_presets())
def test_preset_loads_and_plans(name: str) -> None:
    assert make_plan(load_preset(name)).peak_bytes > 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_shape_of_a_preset_has_the_published_count(name: str) -> None:
    assert read_shape(load_preset(name).model, None).num_parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in list_presets() if name.startswith("gemma-3")])
def test_shape_of_gemma_3_is_that_of_the_class_that_is_loaded(name: str) -> None:
    model = load_preset(name).model
    body = json.loads(known_config(model).read_text())
    config = CONFIG_MAPPING[body.pop("model_type")](**body).get_text_config()
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    tensors = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert dict(read_shape(model, None).tensors) == tensors


@pytest.mark.parametrize("name", [name for name, path in list_presets().items() if "budget_gib" in load_values(path)])
def test_presets_for_a_24_gb_card_fit_it(name: str) -> None:
    spec = load_preset(name)
    assert estimate(spec, read_shape(spec.model, None), CARD).verdict == "fits"


def test_spiel_presets_have_the_papers_number_of_values() -> None:
    """2.3 and 1.9 percent of all parameters, as LoRA of rank 64 has (arXiv:2401.16405, appendix D)."""
    for name, share in (("spiel-ag-llama2-7b", 0.0237), ("spiel-ma-llama2-13b", 0.0192)):
        plan = make_plan(load_preset(name))
        assert plan.num_active / plan.num_parameters == pytest.approx(share, rel=0.01)


def test_glue_presets_have_the_papers_number_of_values() -> None:
    """0.8 M of q, k, v and o beside the classifier (arXiv:2312.11875, Table 2); 355 M parameters (arXiv:1907.11692)."""
    plan = make_plan(load_preset("sift-roberta-large-mrpc"))
    assert (plan.num_active, plan.num_parameters) == (96 * int(0.008 * 1024**2), 355_361_794)
