"""LoRA, IA3 and full fine-tuning: they learn, and chat takes their result out of the model bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.chat import ChatModel
from engine.errors import DeltaError, InvalidSpecError, TargetsError
from engine.export import export
from engine.models import load_model
from engine.runs import Run, create_run, read_spec
from engine.sparse.base_weight import nf4_config
from engine.sparse.delta import SparseDelta
from engine.spec import RunSpec
from engine.spec_io import parse_spec
from engine.train.baselines import AdapterTuning
from engine.train.results import apply_result
from engine.train.tuning import Tuning, start_tuning

CPU = torch.device("cpu")
IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))
BASES = [("float32", "none"), ("bfloat16", "none"), ("float32", "nf4"), ("bfloat16", "nf4")]
CASES = [
    (method, *base) for method in ("lora", "ia3", "full") for base in BASES if (method, base[1]) != ("full", "nf4")
]


@pytest.fixture
def spec(model_folder: Path, tmp_path: Path) -> Callable[..., RunSpec]:
    def make(method: str, **fields: Any) -> RunSpec:
        values = {"learning_rate": 5e-3, "device": "cpu", "output": str(tmp_path / "runs"), **fields}
        return RunSpec(model=str(model_folder), method=method, **values)

    return make


def _train(spec: RunSpec, steps: int = 12) -> tuple[Any, Tuning, list[float]]:
    model = load_model(spec, CPU)
    tuning = start_tuning(model, spec)
    optimizer, losses = tuning.make_optimizer(), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuning.write_back()
        losses.append(float(loss.detach()))
    return model, tuning, losses


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits.clone()


@pytest.mark.parametrize(("method", "dtype", "quantization"), CASES)
def test_result_learns_and_switches_off_to_the_bits_of_the_base(
    spec: Callable[..., RunSpec], tmp_path: Path, method: str, dtype: str, quantization: str
) -> None:
    asked = spec(method, dtype=dtype, quantization=quantization)
    base = _logits(load_model(asked, CPU))
    tuned, tuning, losses = _train(asked)
    assert losses[-1] < losses[0] - 0.005
    assert {values.dtype for values in tuning.values} == {torch.float32}
    tuning.save_result(tmp_path / "delta")
    fresh = load_model(asked, CPU)
    switch = apply_result(fresh, tmp_path / "delta")
    for applied in (True, False, True):
        switch(applied)
        assert torch.equal(_logits(fresh), _logits(tuned) if applied else base)


def test_chat_answers_as_both_sides(spec: Callable[..., RunSpec]) -> None:
    asked = spec("lora", learning_rate=0.05, dataset="demo/pirate")
    run: Run = create_run(asked)
    _train(asked)[1].save_result(run.delta_path)
    chat, texts = ChatModel(run), {"base": "", "tuned": ""}
    for side in ("base", "tuned", "base"):
        last = texts[side]
        chat.answer(
            side,
            [{"role": "user", "content": "1 + 1"}],
            lambda text, _, side=side: texts.__setitem__(side, text),  # type: ignore[misc]
            max_new_tokens=12,
            temperature=0,
        )
        assert last in ("", texts[side])
    assert texts["base"] != texts["tuned"]


def test_small_updates_of_a_16_bit_weight_are_not_lost(spec: Callable[..., RunSpec]) -> None:
    """bf16 cannot hold a step of 1e-6 beside a weight of 0.02; the fp32 master can."""
    _, tuning, _ = _train(spec("full", dtype="bfloat16", learning_rate=1e-6, targets=("q_proj",)), steps=1)
    (name, master), *_ = tuning.named_values.items()
    before = dict(load_model(spec("full", dtype="bfloat16"), CPU).named_parameters())[name]
    moved = (master.detach() - before.detach().float()).abs()
    assert 0 < float(moved.max()) < 2e-6
    assert int((moved > 0).sum()) > 0.9 * moved.numel()


def test_adapter_folder_is_what_peft_writes_with_a_word_on_what_it_is(
    spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    _, tuning, _ = _train(spec("lora", lora_rank=4), steps=1)
    tuning.save_result(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()) == (
        tuning.num_active
    )
    assert json.loads((tmp_path / "delta.json").read_text())["method"] == "lora"
    with pytest.raises(DeltaError, match="holds the result of lora, which is no sparse delta"):
        SparseDelta.load(tmp_path)


@pytest.mark.parametrize(("method", "dtype", "quantization"), CASES)
def test_merged_model_computes_what_the_run_computes(
    spec: Callable[..., RunSpec], tmp_path: Path, method: str, dtype: str, quantization: str
) -> None:
    run = create_run(spec(method, dtype=dtype, quantization=quantization, dataset="demo/pirate"))
    tuned, tuning, _ = _train(read_spec(run))
    tuning.save_result(run.delta_path)
    done = export(run, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert loaded.dtype == getattr(torch, dtype)
    # The merge rounds weight + adapter once to the dtype of the model.
    torch.testing.assert_close(_logits(loaded), _logits(tuned), atol=1e-5 if dtype == "float32" else 5e-2, rtol=0)
    assert f"| Method | {method} |" in (done.folder / "README.md").read_text()


# In float32 bitsandbytes rounds by itself on the CPU over NF4.
@pytest.mark.parametrize(("dtype", "quantization"), [each for each in BASES if each != ("float32", "nf4")])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_stock_peft_loads_the_exported_adapter_to_the_same_logits(
    spec: Callable[..., RunSpec], tmp_path: Path, method: str, dtype: str, quantization: str
) -> None:
    run = create_run(spec(method, dtype=dtype, quantization=quantization, dataset="demo/pirate", attention="eager"))
    tuned, tuning, _ = _train(read_spec(run))
    tuning.save_result(run.delta_path)
    done = export(run, tmp_path / "adapter", "peft")
    config = json.loads((done.folder / "adapter_config.json").read_text())
    computed = getattr(torch, dtype)
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"],
        dtype=computed,
        attn_implementation="eager",
        quantization_config=nf4_config(computed) if quantization == "nf4" else None,
    )
    autocast = "torch.autocast(device, torch.bfloat16)" in (done.folder / "README.md").read_text()
    assert autocast == ((method, dtype, quantization) == ("ia3", "bfloat16", "nf4"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = _logits(PeftModel.from_pretrained(base, done.folder))
    atol = 1e-5 if computed == torch.float32 else 2**-7
    torch.testing.assert_close(logits, _logits(tuned), atol=atol, rtol=0)


def test_full_has_no_adapter_and_the_merge_is_offered(spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    run = create_run(spec("full", dataset="demo/pirate"))
    _train(read_spec(run), steps=1)[1].save_result(run.delta_path)
    with pytest.raises(DeltaError, match=r"whole weights, not an adapter.*\(--as merged\)"):
        export(run, tmp_path / "adapter", "peft")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_result_is_refused_over_another_base(spec: Callable[..., RunSpec], tmp_path: Path, method: str) -> None:
    _, tuning, _ = _train(spec(method), steps=1)
    tuning.save_result(tmp_path)
    other = load_model(spec(method), CPU)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(DeltaError, match="not those the delta was trained on"):
        apply_result(other, tmp_path)


def test_patterns_choose_single_layers(spec: Callable[..., RunSpec]) -> None:
    asked = spec("ia3", targets=("model.layers.1.*",))
    tuning = start_tuning(load_model(asked, CPU), asked)
    assert isinstance(tuning, AdapterTuning)
    assert tuning.num_targets == 7
    assert all(".layers.1." in name for name in tuning.named_values)


def test_targets_without_a_linear_layer_are_refused(spec: Callable[..., RunSpec]) -> None:
    asked = spec("lora", targets=("embed_tokens",))
    with pytest.raises(TargetsError, match=r"'embed_tokens' hold no linear layer of the blocks for lora"):
        start_tuning(load_model(asked, CPU), asked)


def test_full_over_nf4_and_sm3_over_an_adapter_are_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidSpecError, match=r"quantization must be none for full.*or method=lora"):
        parse_spec({"model": "demo", "method": "full", "quantization": "nf4"})
    with pytest.raises(InvalidSpecError, match=r"optimizer must be any but sm3 for lora.*Use optimizer=auto"):
        parse_spec({"model": "demo", "method": "lora", "optimizer": "sm3"})
