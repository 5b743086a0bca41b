"""What the plan says of the optimizer's states: against the states that real optimizers have."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.hardware import Device
from engine.planner import formulas
from engine.planner.estimate import Plan, Remedy, estimate
from engine.planner.ledger import RESIDENT
from engine.planner.remedies import find_remedies
from engine.planner.shape import ModelShape, read_shape
from engine.sparse.entries import ActiveEntries
from engine.sparse.optimizers import build_optimizer, values_optimizer
from engine.spec import RunSpec, choices
from engine.spec_rules import rule_problems
from engine.units import GIB

CARD = Device("cuda:0", "a card of 24 GiB", 24 * GIB, 24 * GIB)
SIZES = (5000, 300, 4096)
# Fields of a spec, and how the planner counts them.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"optimizer": name}, {}) for name in choices("optimizer") if name not in ("auto", "sm3")),
    ({"optimizer": "adamw", "method": "spiel-ag"}, {"ages": True}),
    ({"optimizer": "adamw", "optimizer_states": "8bit"}, {"eight_bit": True}),
    ({"optimizer": "adamw", "optimizer_states": "8bit", "method": "spiel-ag"}, {"eight_bit": True, "ages": True}),
]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made and alive at once; fused kernels make none."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in known | self._live.keys():
                self._live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, id(storage), None)
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def _optimizer(sizes: tuple[int, ...], fields: dict[str, Any]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    values = [nn.Parameter(torch.randn(size)) for size in sizes]
    return values, values_optimizer(values, RunSpec(model="m", **{"method": "random", **fields}))


def _step(values: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for each in values:
        each.grad = torch.randn_like(each)
    optimizer.step()


@pytest.mark.parametrize(("fields", "counted"), CASES)
def test_states_are_counted_to_the_byte(fields: dict[str, Any], counted: dict[str, Any]) -> None:
    values, optimizer = _optimizer(SIZES, fields)
    _step(values, optimizer)
    held = sum(state.nbytes for each in values for state in optimizer.state[each].values())
    assert held == formulas.optimizer_states_bytes(SIZES, fields["optimizer"], **counted)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("fields", "counted"), CASES)
def test_an_update_takes_no_more_than_the_plan_says(
    fields: dict[str, Any], counted: dict[str, Any], weight_decay: float
) -> None:
    decay = 0.0 if fields["optimizer"] == "rprop" else weight_decay
    values, optimizer = _optimizer((51_200,), {**fields, "weight_decay": decay})
    _step(values, optimizer)
    values[0].grad = torch.randn(51_200)
    with _LiveBytes() as live:
        optimizer.step()
    planned = formulas.update_bytes(51_200, fields["optimizer"], decay=decay > 0, **counted)
    assert 0.6 * planned <= live.peak <= 1.02 * planned + 2048


def _compact(count: int) -> tuple[ActiveEntries, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.randn(512, 2000).bfloat16(), requires_grad=False)
    entry = ActiveEntries("w", weight, count, compact=True)
    entry.place(torch.randperm(weight.numel())[:count].sort().values.int())
    spec = RunSpec(model="m", method="random", optimizer_states="compact", dtype="bfloat16")
    optimizer = build_optimizer([entry], spec)
    entry.add_gradient(torch.randn(count))
    optimizer.step()
    entry.write_back()
    return entry, optimizer


@pytest.mark.parametrize("count", [51_200, 300])
def test_compact_entries_are_counted_to_the_byte(count: int) -> None:
    entry, _ = _compact(count)
    held = {"values": 0, "indices": 0}
    for part, tensor in entry.resident():
        held[part] += tensor.untyped_storage().nbytes()
    numel = entry.weight.numel()
    assert held["values"] == formulas.split_values_bytes(count)
    assert held["indices"] == formulas.indices_bytes({"w": numel}, {"w": count}, {"w": 2000})


@pytest.mark.parametrize("first", [True, False])
def test_an_update_of_compact_entries_takes_no_more_than_the_plan_says(first: bool) -> None:
    """The first one is made beside the base, and puts the masters into the weight afterwards."""
    entry, optimizer = _compact(51_200)
    if first:
        entry.restore()
    with _LiveBytes() as live:
        optimizer.step()
        entry.write_back()
    planned = formulas.update_bytes(51_200, "adamw", eight_bit=True, split=True)
    assert 0.7 * planned <= live.peak <= 1.02 * planned + 4 * 512 + 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_write_back_takes_what_the_plan_says(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(512, 1000).to(dtype), requires_grad=False)
    entry = ActiveEntries("w", weight, 50_000)
    entry.place(torch.arange(50_000, dtype=torch.int32))
    with _LiveBytes() as live:
        entry.write_back()
    assert live.peak == formulas.write_back_bytes(50_000, weight.element_size())


@pytest.mark.parametrize(
    ("fields", "num_bytes"),
    [
        ({}, 2 * 262_144 + 4),
        ({"ages": True}, 3 * 262_144),
        ({"eight_bit": True}, 2 * (65_536 + 1024) + 4),
        ({"eight_bit": True, "ages": True}, 2 * (65_536 + 1024) + 131_072),
    ],
)
def test_states_in_pinned_memory_take_powers_of_two(fields: dict[str, bool], num_bytes: int) -> None:
    assert formulas.optimizer_states_bytes([50_000], "adamw", pinned=True, **fields) == num_bytes


def _plan(folder: str, **fields: Any) -> Plan:
    settings = {"density": 0.05, "gradient_checkpointing": True, "gradient_accumulation": 1, "method": "random"}
    spec = RunSpec(model=folder, **{**settings, **fields})
    return estimate(spec, read_shape(folder), CARD)


def test_states_in_main_memory_leave_the_card(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    here, there = _plan(folder), _plan(folder, offload_states=True)
    assert here.parts["optimizer_states"] == pytest.approx(8 * here.num_active, rel=1e-5)
    assert there.parts["optimizer_states"] == 0
    # Pinned memory comes in powers of two.
    assert 2 * here.parts["optimizer_states"] > there.host_bytes > here.parts["optimizer_states"] > 2 * GIB
    assert here.peak_bytes - there.peak_bytes > 0.8 * here.parts["optimizer_states"]


@pytest.mark.parametrize(("method", "share"), [("random", 1 / 4), ("spiel-ag", 1 / 3), ("lora", 1 / 4)])
def test_8_bit_states_take_a_share_of_the_memory(config_folder: Callable[..., str], method: str, share: float) -> None:
    folder = config_folder()
    plain, coded = (_plan(folder, method=method, optimizer_states=states) for states in ("float32", "8bit"))
    assert coded.parts["optimizer_states"] / plain.parts["optimizer_states"] == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(("quantization", "plain"), [("none", 16), ("nf4", 14)])
def test_compact_entries_take_12_bytes_in_the_plan(
    config_folder: Callable[..., str], quantization: str, plain: int
) -> None:
    plans = [
        _plan(config_folder(), quantization=quantization, optimizer_states=states) for states in ("8bit", "compact")
    ]
    each = [sum(plan.parts[part] for part in RESIDENT[1:]) / plan.num_active for plan in plans]
    assert each == pytest.approx([plain, 12], abs=0.1)


def test_compact_entries_are_offered_where_8_bit_states_are_not_enough(config_folder: Callable[..., str]) -> None:
    folder = config_folder()
    spec = RunSpec(model=folder, density=0.12, gradient_checkpointing=True, optimizer_states="8bit")
    shape = read_shape(folder)
    found = {remedy.changes.get("optimizer_states"): remedy for remedy in _remedies(spec, shape)}
    remedy = found["compact"]
    assert remedy.changes["dtype"] == "bfloat16"
    changed = estimate(spec.model_copy(update=remedy.changes), shape, CARD)
    assert not rule_problems(spec.model_copy(update=remedy.changes))
    assert remedy.saved_bytes == estimate(spec, shape, CARD).peak_bytes - changed.peak_bytes > 2 * GIB
    wide = spec.model_copy(update={"dtype": "float32"})
    assert all(remedy.changes.get("optimizer_states") != "compact" for remedy in _remedies(wide, shape))


def _remedies(spec: RunSpec, shape: ModelShape) -> tuple[Remedy, ...]:
    return find_remedies(spec, shape, CARD, estimate(spec, shape, CARD))


def test_states_are_among_the_remedies_in_the_order_of_their_cost(config_folder: Callable[..., str]) -> None:
    spec = RunSpec(model=config_folder(), method="spiel-ag", density=0.3, dtype="float32", micro_batch_size=2)
    shape = read_shape(spec.model)
    fields = [next(iter(each.changes)) for each in find_remedies(spec, shape, CARD, estimate(spec, shape, CARD))]
    order = ["micro_batch_size", "offload_states", "optimizer_states", "dtype"]
    assert [name for name in fields if name in order] == order
