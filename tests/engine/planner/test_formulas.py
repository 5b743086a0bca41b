"""Closed forms against the published table and hand-counted sizes."""

import math
from collections.abc import Callable

import pytest

from engine.planner import formulas
from engine.planner.activations import (
    Setting,
    blocks_saved_bytes,
    choose_kernel,
    head_saved_bytes,
    loss_saved_bytes,
    shared_saved_bytes,
    trained_parts,
)
from engine.planner.shape import read_shape, target_tensors
from engine.units import GIB

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
    shape = read_shape(config_folder())
    setting = Setting(1, 2048, 2, "eager", checkpointing)
    # The table counts what is left after the forward, the logits dropped.
    saved = blocks_saved_bytes(shape, setting, trained_parts(shape, target_tensors(shape, "all")))
    saved += shared_saved_bytes(shape, setting) + head_saved_bytes(shape, setting, True, True)
    assert (saved + loss_saved_bytes(shape, setting)) / GIB == pytest.approx(TABLE_1[published], rel=0.01)


def test_sizes_of_the_trained_entries_are_hand_counted() -> None:
    active = {"small": 10, "large": 2}
    assert formulas.values_bytes(12) == 48
    assert formulas.replaced_bytes(12, 2) == 24
    assert formulas.indices_bytes({"small": 100, "large": 2**31}, active) == 10 * 4 + 2 * 8
    assert formulas.optimizer_states_bytes([10, 2], "sgd") == 0
    assert formulas.optimizer_states_bytes([5000, 10], "adamw", ages=True, eight_bit=True) == (
        2 * (5000 + 4 * 20) + 2 * 5000 + (4 + 4 + 4) * 10
    )
    assert formulas.write_back_bytes(active, 2) == 10 * (8 + 4 + 4 + 2)
    assert formulas.accumulated_gradient_bytes({"a": 3, "b": 4}) == 28


def test_the_kernel_follows_device_dtype_and_padding(config_folder: Callable[..., str]) -> None:
    grouped = read_shape(config_folder(num_key_value_heads=8))
    assert choose_kernel(grouped, "sdpa", 2, 1, 512, on_cpu=False) == "flash"
    assert choose_kernel(grouped, "sdpa", 4, 1, 512, on_cpu=True) == "flash"
    assert choose_kernel(grouped, "sdpa", 4, 1, 512, on_cpu=False) == "math"
    assert choose_kernel(grouped, "sdpa", 2, 2, 512, on_cpu=False) == "masked"
    assert choose_kernel(grouped, "eager", 2, 2, 512, on_cpu=True) == "eager"


def test_only_blocks_that_a_gradient_reaches_keep_anything(config_folder: Callable[..., str]) -> None:
    shape = read_shape(config_folder())
    parts = trained_parts(shape, ["model.layers.30.mlp.down_proj.weight"])
    assert [number for number, part in enumerate(parts) if part.reached] == [30, 31]
    setting = Setting(1, 128, 2, "flash", checkpointing=True)
    assert blocks_saved_bytes(shape, setting, parts) == 2 * math.prod((128, 4096, 2))
