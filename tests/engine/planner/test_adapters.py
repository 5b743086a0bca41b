"""The plan of the baselines against PEFT's own count and against what autograd and the backward really hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.data.batches import Batch
from engine.errors import TargetsError
from engine.evaluate import causal_loss
from engine.hardware import Device
from engine.planner.estimate import Plan, estimate
from engine.planner.remedies import find_remedies
from engine.planner.shape import read_shape
from engine.spec import RunSpec
from engine.targets import adapted_weights, adapter_numel
from engine.train.tuning import start_tuning
from engine.units import GIB

LENGTH = 256
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
CPU = Device("cpu", "a CPU", 100 * GIB, 100 * GIB)


def _case(folder: Path, family: str = "llama", **fields: Any) -> tuple[RunSpec, Any, Plan]:
    config = AutoConfig.for_model(family, **CONFIG | ({"intermediate_size": 512} if family == "gpt2" else {}))
    config.save_pretrained(folder)
    values = {
        "dtype": "float32",
        "sequence_length": LENGTH,
        "gradient_accumulation": 1,
        "lora_rank": 4,
        "device": "cpu",
    }
    spec = RunSpec(model=str(folder), **{**values, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa")
    return spec, model.train(), estimate(spec, read_shape(str(folder)), CPU)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("targets", ["linear", "attention"])
@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_planned_count_is_what_is_trained(tmp_path: Path, family: str, targets: str, method: str) -> None:
    spec, model, plan = _case(tmp_path, family, method=method, targets=targets)
    tuning = start_tuning(model, spec)
    assert (plan.num_active, plan.target_numel) == (tuning.num_active, tuning.target_numel)
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == tuning.num_active


def test_lora_on_seven_billion_parameters_has_the_known_count() -> None:
    """Rank 16 on all seven linear layers of Llama-7B: 39,976,960, as PEFT prints it."""
    square, up, down = (4096, 4096), (11008, 4096), (4096, 11008)
    block = 4 * adapter_numel("q_proj.weight", square, "lora", 16)
    block += 2 * adapter_numel("up_proj.weight", up, "lora", 16) + adapter_numel("down_proj.weight", down, "lora", 16)
    assert 32 * block == 39_976_960


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "accumulation"), [("lora", 1), ("ia3", 1), ("full", 1), ("full", 2)])
def test_planned_peak_is_what_two_steps_hold(
    tmp_path: Path, live: Any, method: str, accumulation: int, dtype: str, checkpointing: bool
) -> None:
    fields = {"method": method, "dtype": dtype, "gradient_checkpointing": checkpointing}
    spec, model, plan = _case(tmp_path, gradient_accumulation=accumulation, **fields)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    tuning = start_tuning(model, spec)
    with live:
        for parameter in {*model.parameters(), *tuning.values}:
            live.add(parameter.detach())
        optimizer = tuning.make_optimizer()
        for micro_step in range(2 * accumulation):
            causal_loss(model, Batch(ids, ids, torch.ones_like(ids), LENGTH), LENGTH, torch.device("cpu")).backward()
            if (micro_step + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tuning.write_back()
    planned = plan.peak_bytes - plan.parts["workspace"] - plan.parts["context"]
    assert planned == pytest.approx(live.peak, rel=0.03)


def test_remedies_of_full_leave_its_base_dense(tmp_path: Path) -> None:
    spec, _, plan = _case(tmp_path, method="full", micro_batch_size=4)
    small = replace(CPU, total_bytes=GIB // 4)
    shape = read_shape(spec.model)
    changed = {
        name for remedy in find_remedies(spec, shape, small, estimate(spec, shape, small)) for name in remedy.changes
    }
    assert plan.verdict == "fits"
    assert "gradient_checkpointing" in changed
    assert changed.isdisjoint({"quantization", "density"})


def test_ia3_takes_what_its_paper_scales_and_patterns_as_they_are() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    shapes = {f"model.layers.0.{name}.weight": (8, 8) for name in names} | {"model.norm.weight": (8,)}
    assert [name.split(".")[3] for name in adapted_weights(shapes, "linear", "ia3")] == [
        "k_proj",
        "v_proj",
        "down_proj",
    ]
    assert len(adapted_weights(shapes, ("q_proj", "o_proj"), "ia3")) == 2
    with pytest.raises(TargetsError, match="no linear layer of the blocks for lora"):
        adapted_weights(shapes, ("norm",), "lora")
