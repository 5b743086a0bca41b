"""How little is kept: the steps from all to next to nothing, and the first of them that fits."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from engine.errors import InvalidSpecError
from engine.hardware import Device
from engine.planner.estimate import estimate
from engine.planner.plan import make_plan
from engine.planner.recompute import Kept, choices, kept_by_block, resolved
from engine.planner.shape import read_shape
from engine.planner.trace import trace
from engine.spec import RunSpec
from engine.spec_io import parse_spec
from engine.units import GIB

CARD = Device("cuda:0", "a card", 24 * GIB, 24 * GIB)


def _spec(model: str = "tiny", **fields: Any) -> RunSpec:
    return RunSpec(model=model, **{"dtype": "bfloat16", "sequence_length": 2048, "gradient_accumulation": 1, **fields})


def test_the_first_blocks_keep_least() -> None:
    found = kept_by_block(_spec(recompute="blocks", recompute_blocks=1), "llama", 3)
    assert found == (Kept(True, True, False), Kept(True, False, True), Kept(True, True, True))
    found = kept_by_block(_spec(recompute="mlp", recompute_blocks=2), "llama", 3)
    assert [each.gates for each in found] == [False, False, True]


def test_an_adapter_or_an_unknown_family_keeps_all_of_a_block() -> None:
    for spec, family in ((_spec(method="lora", recompute="auto"), "llama"), (_spec(recompute="mlp"), "gpt2")):
        assert kept_by_block(spec, family, 2) == (Kept(), Kept())
        assert {level for level, _ in choices(spec, family, 2)} == {"nothing", "blocks"}


@pytest.mark.parametrize("place", range(7))
def test_auto_is_the_first_step_that_fits(place: int) -> None:
    steps = list(choices(_spec(), "llama", 3))
    assert len(steps) == 7

    def fits(spec: RunSpec) -> bool:
        return steps.index((spec.recompute, spec.recompute_blocks)) >= place

    found = resolved(_spec(recompute="auto"), "llama", 3, fits)
    assert (found.recompute, found.recompute_blocks) == steps[place]


def test_each_step_takes_less_memory_than_the_one_before(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    shape = read_shape(folder)
    peaks = [
        estimate(_spec(folder, recompute=level, recompute_blocks=count, chunked_loss=True), shape, CARD).peak_bytes
        for level, count in choices(_spec(), shape.family, shape.layers)
    ]
    assert all(later < earlier for earlier, later in pairwise(peaks[:-1]))
    assert peaks[-1] <= peaks[-2]


def test_auto_recomputes_as_little_as_fits(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    shape = read_shape(folder)
    spec = _spec(folder, sequence_length=4096, recompute="auto", chunked_loss=True)
    plan = estimate(spec, shape, CARD)
    assert plan.verdict == "fits"
    assert (plan.recompute, plan.recompute_blocks is not None) == ("mlp", True)
    one_less = plan.settle(spec).model_copy(update={"recompute_blocks": (plan.recompute_blocks or 0) - 1})
    assert estimate(one_less, shape, CARD).verdict != "fits"


def test_what_is_recomputed_costs_operations(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    levels: list[dict[str, Any]] = [
        {"recompute": "elementwise"},
        {"recompute": "mlp"},
        {"recompute": "blocks"},
        {"gradient_checkpointing": True},
    ]
    flops = [make_plan(_spec(folder, **level), card="4090", with_remedies=False).flops for level in levels]
    assert flops[0] < flops[1] < flops[2] == flops[3]


@pytest.mark.parametrize("level", [{"gradient_checkpointing": True}, {"recompute": "blocks", "recompute_blocks": 2}])
def test_inputs_in_main_memory_are_counted_there(level: dict[str, Any], tmp_path: Path) -> None:
    AutoConfig.for_model("llama", hidden_size=256, intermediate_size=704, num_hidden_layers=4).save_pretrained(tmp_path)
    spec = _spec(str(tmp_path), sequence_length=512, chunked_loss=True, probe_interval=0, density=0.02, **level)
    spec = spec.model_copy(update={"offload_activations": True})
    plan, found = estimate(spec, read_shape(str(tmp_path)), CARD), trace(spec, CARD, rounding=0)
    planned = plan.peak_bytes - plan.parts["workspace"] - plan.parts["context"]
    assert planned == pytest.approx(found.peak.total, rel=0.01)
    blocks = level.get("recompute_blocks", 4)
    assert plan.host_bytes == blocks * 512 * 256 * 2
    assert found.host_bytes - 2**15 < plan.host_bytes <= found.host_bytes  # and the ids of the rows


def test_the_layers_of_an_adapter_are_its_own() -> None:
    with pytest.raises(InvalidSpecError, match=r"recompute must be nothing, blocks or auto for lora.*got 'mlp'"):
        parse_spec({"model": "demo", "method": "lora", "recompute": "mlp"})


@pytest.mark.parametrize("level", ["nothing", "elementwise", "auto"])
def test_a_number_of_blocks_that_nothing_reads_is_said(level: str) -> None:
    said = f"recompute_blocks must be empty with recompute={level}, which counts no blocks, got 3."
    with pytest.raises(InvalidSpecError, match=said):
        parse_spec({"model": "demo", "recompute": level, "recompute_blocks": 3})


def test_more_blocks_than_the_model_has_are_said(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    shape = read_shape(folder)
    most = shape.layers
    said = f"recompute_blocks must be at most {most}, the blocks of the model, got {most + 1}. Lower it, or"
    with pytest.raises(InvalidSpecError, match=said):
        estimate(_spec(folder, recompute="mlp", recompute_blocks=most + 1), shape, CARD)


def test_the_plan_says_what_is_recomputed_and_nothing_else(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    shape = read_shape(folder)

    def said(**fields: Any) -> str:
        return estimate(_spec(folder, **fields), shape, CARD).recomputed

    assert said() == ""
    layers = shape.layers
    assert (
        said(recompute="mlp")
        == said(recompute="mlp", recompute_blocks=layers)
        == (f"norm outputs, activation products, gate and up in {layers} of {layers} blocks")
    )
    assert said(method="lora", recompute="blocks", recompute_blocks=2) == f"2 of {layers} blocks as a whole"
