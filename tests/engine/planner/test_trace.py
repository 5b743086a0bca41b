"""The trace on the meta device against the same count over real tensors of a real run on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.errors import ModelError
from engine.hardware import Device
from engine.models import load_classifier, load_model
from engine.planner import formulas
from engine.planner.estimate import estimate
from engine.planner.ledger import Figures, add_up
from engine.planner.scenario import Scenario
from engine.planner.shape import read_shape
from engine.planner.short_run import rows, traced_spec
from engine.planner.storages import StorageMeter
from engine.planner.trace import count_real, record, trace
from engine.sparse.selection import select_random_indices
from engine.spec import RunSpec
from engine.units import GIB

CPU = Device("cpu", "CPU", 16 * GIB, 16 * GIB)
GPU = Device("cuda:0", "a card of 24 GiB", 24 * GIB, 24 * GIB)
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
# Families that the closed forms do not know: each has something that the attention of a Llama has not.
UNKNOWN: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},  # plain products alone
    "gemma2": {**SMALL, "sliding_window": 32},  # and a cap on the scores
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 256, "n_positions": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256},  # one key
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "state_size": 8},  # none at all
    "deepseek_v3": {  # values narrower than keys
        **SMALL,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}
FAMILIES |= UNKNOWN


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


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"method": "sift"}) for family in FAMILIES),
    *((family, {"method": "full", "gradient_checkpointing": True}) for family in FAMILIES if family not in UNKNOWN),
    *(("llama", {"method": method, "gradient_checkpointing": True}) for method in ("spiel-ag", "lora", "fisher")),
    *(("llama", {"method": method, "quantization": "nf4"}) for method in ("sift", "spiel-ma", "lora", "ia3")),
    ("qwen3", {"attention": "eager", "dtype": "bfloat16"}),
    ("qwen3", {"method": "spiel-ag", "gradient_accumulation": 3, "micro_batch_size": 2, "probe_interval": 5}),
    ("llama", {"targets": "all", "chunked_loss": True, "gradient_checkpointing": True}),
    ("llama", {"dtype": "bfloat16", "optimizer_states": "compact"}),
    ("llama", {"quantization": "nf4", "optimizer_states": "compact", "method": "random"}),
    ("llama", {"optimizer": "adam"}),  # counts its steps in main memory, and divides by what that comes to
    ("llama", {"dtype": "float16", "optimizer_states": "8bit", "reselection_period": 4, "max_steps": 20}),
]


@pytest.mark.parametrize(("family", "fields"), CASES, ids=lambda each: each if isinstance(each, str) else None)
def test_the_trace_is_a_real_step(family: str, fields: dict[str, Any], folder: Any) -> None:
    traced, real = _both(_spec(folder(family), **fields))
    assert traced.peak.total == pytest.approx(real.peak.total, rel=1e-3)
    for part, num_bytes in real.peak.parts.items():
        assert traced.peak.parts[part] == pytest.approx(num_bytes, abs=1e-3 * real.peak.total), part
    assert (traced.peak.phase, traced.peak.operation) == (real.peak.phase, real.peak.operation)
    # The loss in chunks holds 8 bytes for each labelled token in main memory, which models this small can tell.
    assert traced.after_forward.total == pytest.approx(real.after_forward.total, rel=1e-3, abs=2048)


@pytest.mark.parametrize("method", ["sift", "lora"])
def test_the_trace_of_a_classifier_is_a_real_step(method: str, tmp_path: Path) -> None:
    sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    config = AutoConfig.for_model("bert", **sizes, num_attention_heads=4)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    spec = _spec(str(tmp_path), method=method, task="classification", micro_batch_size=4, gradient_checkpointing=True)
    model, head = load_classifier(spec, torch.device("cpu"), ("no", "yes"))
    real = add_up(count_real(model, spec, head=head), 0, host_apart=False)
    traced = trace(spec, CPU, rounding=0)
    assert traced.peak.total == pytest.approx(real.peak.total, rel=1e-3)
    assert (traced.peak.phase, traced.peak.operation) == (real.peak.phase, real.peak.operation)


def test_blocks_that_transformers_cannot_compute_anew_are_refused(tmp_path: Path) -> None:
    sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    AutoConfig.for_model("mpnet", **sizes, num_attention_heads=4).save_pretrained(tmp_path)
    spec = _spec(str(tmp_path), task="classification", gradient_checkpointing=True)
    with pytest.raises(ModelError, match="gradient_checkpointing must be false for models of the family 'mpnet'"):
        trace(spec, CPU)


def test_padding_needs_a_mask_and_equal_rows_do_not(folder: Any) -> None:
    spec = _spec(folder("llama"), micro_batch_size=2)
    even, padded = (trace(spec, GPU, padded=padded) for padded in (False, True))
    assert padded.peak.parts["saved_activations"] > even.peak.parts["saved_activations"]


def test_the_order_of_the_rows_decides_nothing(folder: Any) -> None:
    fields = {"micro_batch_size": 2, "gradient_accumulation": 2, "density": 0.3, "method": "random"}
    model = folder("llama")
    assert len({trace(_spec(model, seed=seed, **fields), CPU).peak.total for seed in range(4)}) == 1


@pytest.mark.parametrize("count", [40_000, 250_000])
def test_a_draw_takes_what_is_planned_and_its_trace_as_much(count: int) -> None:
    numel = 2**21
    peaks = []
    for scenario in (None, Scenario({1: count}, on_cpu=True)):
        meter = StorageMeter(scenario)
        with meter:
            drawn = select_random_indices(numel, count, torch.Generator().manual_seed(0))
        assert drawn.numel() == count
        del drawn
        meter.ledger.settle()
        peaks.append(add_up(meter.ledger, 0, host_apart=False).peak.total)
    assert peaks == [formulas.draw_bytes(numel, count)] * 2


def test_main_memory_is_apart_beside_a_gpu(folder: Any) -> None:
    spec = _spec(folder("llama"), gradient_accumulation=2)
    beside, inside = trace(spec, GPU), trace(spec, CPU)
    numel = sum(64 * width for width in (64, 32, 32, 64, 128, 128, 128)) * 2
    assert beside.host_bytes >= 4 * numel > inside.host_bytes == 0


def test_the_peak_names_what_is_at_work(folder: Any) -> None:
    peak = trace(_spec(folder("llama"), gradient_checkpointing=True), GPU).peak
    assert peak.phase in ("backward", "backward of the loss")
    assert peak.operation.startswith("aten.")
    assert peak.total == sum(peak.parts.values()) >= sum(size for *_, size in peak.largest)


def test_figures_survive_json(folder: Any) -> None:
    figures = trace(_spec(folder("llama")), CPU)
    assert Figures.of(json.loads(json.dumps(figures.to_dict()))) == figures


def test_llama_7b_in_eager_attention_holds_what_the_paper_says(tmp_path: Path) -> None:
    AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ).save_pretrained(tmp_path)
    spec = _spec(str(tmp_path), sequence_length=2048, density=0.05, targets="all", attention="eager")
    after = trace(spec, GPU).after_forward.parts
    assert after["saved_activations"] / GIB == pytest.approx(35.72, rel=0.01)  # arXiv:2312.11875, Table 1


@pytest.mark.parametrize("method", ["sift", "spiel-ag"])
def test_ways_that_hang_on_numbers_take_what_the_trace_says_at_most(method: str, folder: Any) -> None:
    traced, real = _both(_spec(folder("llama"), method=method, gradient_way="compaction"))
    assert real.peak.total <= 1.01 * traced.peak.total


@pytest.mark.parametrize("density", [0.1, 0.7])
@pytest.mark.parametrize("method", ["sift", "fisher", "magnitude", "spiel-ag"])
def test_neither_trace_nor_plan_is_below_a_run_with_one_budget(method: str, density: float, folder: Any) -> None:
    spec = _spec(folder("llama"), method=method, density=density, allocation="global", sequence_length=16)
    short, meter = traced_spec(spec).model_copy(update={"allocation": "global"}), StorageMeter()
    record(load_model(spec, torch.device("cpu")), short, meter, rows(short, padded=False))
    real = add_up(meter.ledger, 0, host_apart=False).peak.total
    plan = estimate(spec, read_shape(spec.model), CPU)
    planned = plan.peak_bytes - plan.parts["workspace"] - plan.parts["context"]
    assert 0.99 * real <= planned <= 1.15 * real
    assert trace(spec, CPU, rounding=0).peak.total >= 0.99 * real
