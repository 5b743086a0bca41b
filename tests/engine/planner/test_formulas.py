"""Closed forms against the published table and hand-counted sizes."""

from collections.abc import Callable

import pytest

from engine.hardware import Device
from engine.planner import formulas
from engine.planner.activations import choose_kernel
from engine.planner.moments import after_forward_bytes
from engine.planner.shape import read_shape
from engine.planner.workload import build_workload
from engine.spec import RunSpec
from engine.units import GIB

CARD = Device("cuda:0", "a card", 80 * GIB, 80 * GIB)
# SIFT, Table 1 (arXiv:2312.11875): Llama-7B in bf16, all parameters, density 0.05, 2048 tokens, eager attention.
TABLE_1 = {"parameters": 12.55, "gradients": 0.626, "optimizer": 2.51, "activations": 35.72, "checkpointed": 0.81}


def test_resident_terms_are_those_of_the_published_table(config_folder: Callable[..., str]) -> None:
    parameters = read_shape(config_folder()).num_parameters
    found = {
        "parameters": formulas.parameters_bytes(parameters, 2),
        "gradients": formulas.gradients_bytes(parameters // 20, element_bytes=2),
        "optimizer": formulas.optimizer_states_bytes([parameters // 20], "adamw"),
    }
    assert {name: size / GIB for name, size in found.items()} == pytest.approx(
        {name: TABLE_1[name] for name in found}, rel=0.01
    )


@pytest.mark.parametrize(("checkpointing", "published"), [(False, "activations"), (True, "checkpointed")])
def test_activations_are_those_of_the_published_table(
    config_folder: Callable[..., str], checkpointing: bool, published: str
) -> None:
    folder = config_folder()
    spec = RunSpec(
        model=folder, targets="all", sequence_length=2048, attention="eager", gradient_checkpointing=checkpointing
    )
    # The table counts what is left after the forward, the logits dropped.
    saved = after_forward_bytes(build_workload(spec, read_shape(folder), CARD))
    assert saved / GIB == pytest.approx(TABLE_1[published], rel=0.01)


def test_sizes_of_the_trained_entries_are_hand_counted() -> None:
    active = {"small": 10, "large": 2}
    assert formulas.values_bytes(12) == 48
    assert formulas.replaced_bytes(12, 2) == 24
    assert formulas.indices_bytes({"small": 100, "large": 2**31}, active) == 10 * 4 + 2 * 8
    assert formulas.split_values_bytes(12) == 48
    assert formulas.indices_bytes({"w": 600}, {"w": 50}, {"w": 100}) == 50 * 2 + 7 * 4
    assert formulas.indices_bytes({"wide": 2 * 65_537}, {"wide": 500}, {"wide": 65_537}) == 500 * 4
    assert formulas.indices_bytes({"few": 600}, {"few": 13}, {"few": 100}) == 13 * 4
    assert formulas.optimizer_states_bytes([10, 2], "sgd") == 0
    assert formulas.optimizer_states_bytes([5000, 10], "adamw", ages=True, eight_bit=True) == (
        2 * (5000 + 4 * 20) + 2 * 5000 + (4 + 4 + 4) * 10
    )
    assert formulas.write_back_bytes(max(active.values()), 2) == 10 * (8 + 4 + 2)
    assert formulas.write_back_bytes(max(active.values()), 4) == 10 * (8 + 4)
    assert formulas.accumulated_gradient_bytes({"a": 3, "b": 4}) == 28


def test_the_kernel_follows_device_dtype_and_padding(config_folder: Callable[..., str]) -> None:
    grouped = read_shape(config_folder(num_key_value_heads=8))
    assert choose_kernel(grouped, "sdpa", 2, 1, 512, on_cpu=False) == "flash"
    assert choose_kernel(grouped, "sdpa", 4, 1, 512, on_cpu=True) == "flash"
    assert choose_kernel(grouped, "sdpa", 4, 1, 512, on_cpu=False) == "math"
    assert choose_kernel(grouped, "sdpa", 2, 2, 512, on_cpu=False) == "masked"
    assert choose_kernel(grouped, "eager", 2, 2, 512, on_cpu=True) == "eager"


def test_without_checkpointing_only_blocks_that_a_gradient_reaches_keep_anything(
    config_folder: Callable[..., str],
) -> None:
    folder = config_folder()
    spec = RunSpec(model=folder, targets=("model.layers.30.mlp.down_proj.weight",))
    work = build_workload(spec, read_shape(folder), CARD)
    assert (work.lowest, work.enters_blocks) == (30, False)
    everywhere = build_workload(spec.model_copy(update={"targets": "linear"}), read_shape(folder), CARD)
    assert after_forward_bytes(work) < after_forward_bytes(everywhere) / 8
