"""What was measured is kept by device and used by the plan; time comes from a measured rate or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.hardware import Device
from engine.planner.calibration import (
    KEPT_RATES,
    Calibration,
    Rate,
    calibrated,
    calibration_path,
    rate_for,
    read_calibration,
    store_bytes,
    store_rate,
)
from engine.planner.duration import step_flops
from engine.planner.estimate import estimate
from engine.planner.plan import HOW_TO_MEASURE, make_plan
from engine.planner.shape import read_shape
from engine.planner.workload import build_workload
from engine.spec import RunSpec
from engine.units import GIB, MIB

CARD = Device("cuda:0", "a card", 24 * GIB, 24 * GIB)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path / "cache"))


def test_what_was_measured_counts_on_its_device_alone() -> None:
    store_bytes(CARD, 300 * MIB, 20 * MIB)
    store_rate(CARD, Rate("bfloat16", 4096, 1e14))
    other = Device("cuda:0", "another card", 24 * GIB, 24 * GIB)
    assert read_calibration(CARD) == Calibration(300 * MIB, 20 * MIB, (Rate("bfloat16", 4096, 1e14),))
    assert read_calibration(other) == Calibration()
    assert (calibrated(CARD).context_bytes, calibrated(other).context_bytes) == (300 * MIB, None)


def test_the_plan_uses_the_measured_bytes_and_is_surer_of_them(config_folder: Callable[..., str]) -> None:
    spec, shape = RunSpec(model=config_folder(), gradient_checkpointing=True), read_shape(config_folder())
    before = estimate(spec, shape, calibrated(CARD))
    store_bytes(CARD, 300 * MIB, 20 * MIB)
    after = estimate(spec, shape, calibrated(CARD))
    assert (after.parts["context"], after.parts["workspace"]) == (300 * MIB, 20 * MIB)
    assert after.upper_bytes - after.peak_bytes < before.upper_bytes - before.peak_bytes


def test_the_newest_rates_stay_and_the_nearest_in_width_counts() -> None:
    for number in range(KEPT_RATES + 5):
        store_rate(CARD, Rate("bfloat16", 1024, 1e12 + number))
    store_rate(CARD, Rate("bfloat16", 4096, 9e13))
    assert len(read_calibration(CARD).rates) == KEPT_RATES
    assert rate_for(CARD, "bfloat16", 4000) == 9e13
    assert rate_for(CARD, "bfloat16", 1100) == pytest.approx(1e12, rel=1e-3)
    assert rate_for(CARD, "float32", 4096) is None
    assert rate_for(CARD, "bfloat16", 64) is None  # too narrow to be likened to either


def test_a_damaged_file_is_measured_anew() -> None:
    store_rate(CARD, Rate("bfloat16", 1024, 1e12))
    calibration_path().write_text("[1")
    assert read_calibration(CARD) == Calibration()
    store_rate(CARD, Rate("bfloat16", 1024, 2e12))
    assert rate_for(CARD, "bfloat16", 1024) == 2e12


def test_operations_of_a_step_are_hand_counted(config_folder: Callable[..., str]) -> None:
    shape = read_shape(config_folder(num_hidden_layers=2))
    spec = RunSpec(model=shape.source, sequence_length=128, gradient_accumulation=3, targets=("layers.1.*q_proj*",))
    spec = spec.model_copy(update={"targets": ("model.layers.1.self_attn.q_proj.weight",)})
    block, head, target = 4 * 4096**2 + 3 * 4096 * 11008, 32_000 * 4096, 4096**2
    scores = 2 * 128 * 4096  # flash skips half of 4 s q
    per_token = 2 * (2 * block + scores) + (2 * block + 2 * scores) + 4 * head + 2 * target
    assert step_flops(build_workload(spec, shape, CARD)) == 3 * 128 * per_token


def test_checkpointing_computes_the_blocks_again_and_lora_no_dense_gradient(config_folder: Callable[..., str]) -> None:
    shape = read_shape(config_folder())

    def flops(**fields: object) -> float:
        return estimate(RunSpec(model=shape.source).model_copy(update=fields), shape, CARD).flops

    assert 1.28 < flops(gradient_checkpointing=True) / flops() < 1.34
    assert flops(method="lora") < 0.72 * flops()


def test_without_a_rate_there_is_no_time_and_the_plan_says_so(config_folder: Callable[..., str]) -> None:
    spec = RunSpec(model=config_folder(), max_steps=100)
    plan = make_plan(spec, card="RTX 4090 24 GB")
    assert plan.step_s is None
    assert "known only for a device that was measured, and RTX 4090 24 GB is not here" in plan.rate_note
    here = make_plan(spec.model_copy(update={"device": "cpu"})).rate_note
    assert here.startswith("No time: no run in float32 on a model of about this width was measured on CPU.")
    assert here.endswith(HOW_TO_MEASURE)
    store_rate(Device("cuda:0", "RTX 4090 24 GB", 1, 1), Rate("bfloat16", 4096, 1e14))
    timed = make_plan(spec, card="RTX 4090 24 GB")
    assert timed.step_s == pytest.approx(timed.flops / 1e14)
    assert timed.run_s == pytest.approx(100 * timed.flops / 1e14)
