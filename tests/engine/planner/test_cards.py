"""Cards to plan for: their memory, what kernels they have, and that a plan is against what is free."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.errors import DeviceError
from engine.hardware import Device, budget_bytes_of
from engine.planner import formulas
from engine.planner.activations import choose_kernel
from engine.planner.cards import CARDS, card_device, find_card
from engine.planner.plan import make_plan
from engine.planner.shape import read_shape
from engine.spec import RunSpec
from engine.units import GIB, MIB


def test_cards_go_from_8_to_96_gib_and_each_is_found_by_its_name() -> None:
    sizes = [int(card.name.split()[-2]) for card in CARDS]
    assert (sizes[0], sizes[-1]) == (8, 96)
    for card, size in zip(CARDS, sizes, strict=True):
        assert find_card(card.name.lower()) is card
        assert 0.85 * size * GIB < card.usable_bytes < size * GIB


def test_a_part_of_a_name_is_enough_where_it_is_one_card() -> None:
    assert find_card("4090").name == "RTX 4090 24 GB"
    assert find_card("h100 80GB").sm == 90
    with pytest.raises(DeviceError, match=r"A100 40 GB, A100 80 GB, got 'A100'\. Give its whole name"):
        find_card("A100")
    with pytest.raises(DeviceError, match="RTX PRO 6000 96 GB, got ' '"):
        find_card(" ")


def test_a_plan_for_a_card_needs_none_here(config_folder: Callable[..., str]) -> None:
    spec = RunSpec(model=config_folder(), gradient_checkpointing=True, device="cpu")
    plan = make_plan(spec, card="RTX 4090 24 GB")
    assert plan.device == "RTX 4090 24 GB"
    assert plan.budget_bytes == find_card("4090").usable_bytes
    assert plan.parts["parameters"] == 2 * plan.num_parameters  # bf16, as on a GPU


def test_the_budget_is_what_is_free_and_what_own_workers_hold() -> None:
    busy = Device("cuda:0", "a card", 24 * GIB, 10 * GIB, own_bytes=4 * GIB)
    assert budget_bytes_of(None, busy) == 14 * GIB
    assert budget_bytes_of(20, busy) == 14 * GIB
    assert budget_bytes_of(6, busy) == 6 * GIB
    assert budget_bytes_of(None, replace(busy, name="cpu")) == 24 * GIB


def test_old_cards_have_no_flash_and_small_workspaces(config_folder: Callable[..., str]) -> None:
    shape = read_shape(config_folder())
    assert choose_kernel(shape, "sdpa", 2, 1, 512, on_cpu=False, sm=75) == "efficient"
    assert choose_kernel(shape, "sdpa", 2, 1, 512, on_cpu=False, sm=80) == "flash"
    assert formulas.workspace_bytes(False, card_device("RTX 4090 24 GB").sm) == 2 * 8.125 * MIB
    assert formulas.workspace_bytes(False, card_device("H100").sm) == formulas.workspace_bytes(False) == 64 * MIB


def test_a_card_of_a_size_is_any_that_has_as_much() -> None:
    card = card_device("24 GiB")
    assert (card.total_bytes, card.free_bytes, card.is_cpu) == (24 * GIB, 24 * GIB, False)
    for size in ("0 GiB", "-3", "-2.5 gib"):
        with pytest.raises(DeviceError, match=f"must be above 0, as in '24 GiB', got '{size}'"):
            card_device(size)
