"""Traces from a process of their own, kept on disk."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from engine.errors import EngineError, ModelError
from engine.hardware import Device
from engine.planner.plan import make_plan, plan_device
from engine.planner.traced import trace_path, traced
from engine.spec import RunSpec
from engine.tracer import Tracer, plan_by_trace
from engine.units import GIB

CARD = Device("cuda:0", "a card of 24 GiB", 24 * GIB, 24 * GIB)
CPU = Device("cpu", "CPU", 16 * GIB, 16 * GIB)
pytestmark = pytest.mark.xdist_group("tracer")


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A spec of a small model, whose config no other test has: what is traced is kept by config."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 256, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**sizes, written_for=str(tmp_path)).save_pretrained(tmp_path / "model")
    return RunSpec(model=str(tmp_path / "model"), sequence_length=128, gradient_accumulation=2)


def test_a_trace_is_asked_for_once_and_kept(spec: RunSpec, tracer: Tracer) -> None:
    assert traced(spec, CARD) is None
    found = tracer.trace(spec, CARD)
    # 36 MiB at most for a model of 0.3 M parameters: the segments of the allocator are that coarse.
    assert found.figures.peak.total <= found.allocated_bytes <= found.minimum_bytes <= found.reserved_bytes
    fresh = Tracer()
    assert fresh.trace(spec, CARD) == traced(spec, CARD) == found
    fresh.close()


def test_a_cpu_has_no_caching_allocator(spec: RunSpec, tracer: Tracer) -> None:
    found = tracer.trace(spec, CPU)
    assert found.minimum_bytes == found.reserved_bytes == found.figures.peak.total


def test_what_matters_decides_which_trace_it_is(spec: RunSpec) -> None:
    path = trace_path(spec, CARD)
    idle = {"learning_rate": 1e-3, "dataset": "demo", "epochs": 2.0, "gradient_accumulation": 7, "seed": 3}
    assert trace_path(spec.model_copy(update=idle), CARD) == path
    for field, value in {"density": 0.02, "sequence_length": 256, "method": "lora", "gradient_accumulation": 1}.items():
        assert trace_path(spec.model_copy(update={field: value}), CARD) != path, field
    assert trace_path(spec, CPU) != path
    config = Path(spec.model) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 512}))
    assert trace_path(spec, CARD) != path


def test_a_damaged_file_is_no_trace(spec: RunSpec) -> None:
    path = trace_path(spec, CARD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    assert traced(spec, CARD) is None


def test_what_is_wrong_is_said_and_the_process_goes_on(spec: RunSpec, tracer: Tracer) -> None:
    with pytest.raises(EngineError, match="nothing_like_it"):
        tracer.trace(spec.model_copy(update={"targets": ("nothing_like_it",)}), CARD)
    assert tracer.trace(spec, CARD).allocated_bytes > 0


def test_the_plan_of_an_unknown_family_reads_its_trace(spec: RunSpec) -> None:
    config = Path(spec.model) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "olmo2"}))
    small = spec.model_copy(update={"device": "cpu"})
    guessed = make_plan(small)
    assert not guessed.exact
    plan = plan_by_trace(small)
    assert plan.traced
    assert "trace" in plan.note
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert plan.lower_bytes <= plan.peak_bytes <= plan.upper_bytes
    assert plan.upper_bytes - plan.lower_bytes < guessed.upper_bytes - guessed.lower_bytes
    assert set(plan.parts) == set(plan.parts_after_forward) == set(guessed.parts)


def test_neighbours_of_a_trace_are_near_theirs(spec: RunSpec, tracer: Tracer) -> None:
    """The family is taken for a Llama, until its code was traced once."""
    config = Path(spec.model) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bloom", "n_head": 4, "n_layer": 2}))
    small = spec.model_copy(update={"device": "cpu", "sequence_length": 64})
    neighbour = small.model_copy(update={"density": 0.02, "gradient_checkpointing": True})
    guess = make_plan(neighbour).peak_bytes
    tracer.plan(small)
    near, true = make_plan(neighbour), tracer.plan(neighbour)
    assert (near.traced, true.traced) == (False, True)
    assert abs(near.peak_bytes - true.peak_bytes) < 0.5 * abs(guess - true.peak_bytes)
    with torch.device("meta"):
        bloom = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.model))
    assert near.num_parameters == sum(parameter.numel() for parameter in bloom.parameters())


def _as_family(spec: RunSpec, family: str, **changes: object) -> RunSpec:
    config = Path(spec.model) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": family, **changes}))
    return spec.model_copy(update={"device": "cpu"})


def test_what_no_run_can_load_is_refused_where_nothing_can_be_kept(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path / "file"))
    albert = _as_family(spec, "albert", embedding_size=64)
    with Tracer() as tracer, pytest.raises(ModelError, match="gradient_checkpointing must be false"):
        tracer.plan(albert.model_copy(update={"task": "classification", "gradient_checkpointing": True}))


def test_what_cannot_be_traced_leaves_the_estimate(spec: RunSpec, tracer: Tracer) -> None:
    small = _as_family(spec, "jetmoe", num_local_experts=4)  # its routing hangs on numbers
    plan = tracer.plan(small)
    assert not plan.traced
    assert "cannot be traced" in plan.note
    assert plan.peak_bytes == make_plan(small).peak_bytes


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("nothing_like_it", {}, "cannot be loaded"),
        ("deberta-v2", {}, "is no causal language model .*Set task=classification"),
        ("nothing_like_it", {"auto_map": {"AutoConfig": "own.Config"}}, "code of its own, which is not run here"),
    ],
)
def test_a_model_that_no_run_can_load_has_no_plan(
    family: str, changes: dict[str, object], why: str, spec: RunSpec, tracer: Tracer
) -> None:
    small = _as_family(spec, family, **changes)
    for plan in (tracer.plan, make_plan):  # the second knows it from the first
        with pytest.raises(ModelError, match=why):
            plan(small)


def test_fit_and_largest_agree_with_the_plan_of_what_they_find(spec: RunSpec, tracer: Tracer) -> None:
    mamba = _as_family(spec, "mamba", state_size=8)  # no attention to take the training down to
    mamba = mamba.model_copy(update={"budget_gib": 1.0, "micro_batch_size": 64, "sequence_length": 512})
    device = plan_device(mamba)
    fit = tracer.fit(mamba, device)
    assert (fit.plan.traced, fit.plan.verdict) == (True, "fits")
    longest = tracer.largest("sequence_length", fit.spec, device)
    assert longest >= fit.spec.sequence_length
    assert tracer.plan(fit.spec.model_copy(update={"sequence_length": longest})).verdict == "fits"
