"""SpIEL's pieces against what the paper says, computed the slow and obvious way."""

import pytest
import torch
from torch import nn

from engine.planner.storages import StorageMeter
from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import EntrySeeds, SparseAdamW
from engine.sparse.sm3 import SM3, grow_by_momenta
from engine.sparse.spiel import Schedule, choose_drop, exchange, replace_entries


def _entry(dtype: torch.dtype = torch.float32, num_active: int = 60) -> ActiveEntries:
    entry = ActiveEntries("w", nn.Parameter(torch.randn(24, 16).to(dtype)), num_active)
    entry.place(torch.randperm(384)[:num_active].sort().values.int())
    with torch.no_grad():
        entry.values.normal_(std=0.1)
    entry.write_back()
    return entry


@pytest.mark.parametrize("seed", range(5))
def test_growth_by_momenta_is_the_top_of_the_outer_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(30, generator=generator).relu()  # half of them never fed
    columns = torch.randn(50, generator=generator).abs() ** 3
    active = torch.randperm(1500, generator=generator)[:200]
    product = torch.outer(rows.double(), columns.double()).flatten()
    product[active] = -1.0
    expected = product.topk(100).indices
    assert set(grow_by_momenta(rows, columns, active.int(), 100).tolist()) == set(expected.tolist())


def test_growth_never_holds_the_outer_product() -> None:
    rows, columns = torch.randn(600).square(), torch.randn(900).square()
    active = torch.randperm(540_000)[:5_400].sort().values.int()
    with StorageMeter() as meter:
        grow_by_momenta(rows, columns, active, 1_000)
    largest = max(storage.num_bytes for storage in meter.ledger.storages)
    assert 8 * 6_400 <= largest < 16 * 6_400  # int64 positions of all that may grow; a product is 2 MiB


def test_growth_by_momenta_grows_less_where_few_products_are_positive() -> None:
    rows, columns = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0, 1.0])
    grown = grow_by_momenta(rows, columns, torch.tensor([0], dtype=torch.int32), 4)
    assert grown.tolist() == [2]
    assert grow_by_momenta(torch.zeros(2), columns, torch.tensor([0]), 4).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacing_entries_keeps_the_others_and_restores_the_dropped(dtype: torch.dtype) -> None:
    entry = _entry(dtype)
    base = entry.weight.detach().clone().flatten()
    base[entry.placed.long()] = entry.base
    before = dict(zip(entry.placed.tolist(), entry.values.tolist(), strict=True))
    drop = choose_drop(entry.values.detach(), 20)
    dropped = set(entry.placed[drop].tolist())
    again = next(iter(dropped))
    outside = [position for position in range(384) if position not in before][:19]
    positions, source = exchange(entry.placed.long(), entry.values.detach(), drop, torch.tensor([again, *outside]))
    replace_entries(entry, positions, source)
    after = dict(zip(entry.placed.tolist(), entry.values.tolist(), strict=True))
    assert torch.equal(entry.placed, entry.placed.unique())
    assert after.keys() == before.keys() - dropped | {again, *outside}
    assert all(after[position] == before.get(position, 0.0) for position in after)
    assert int((source < 0).sum()) == 19
    gone = torch.tensor(sorted(dropped - {again}))
    assert torch.equal(entry.weight.detach().flatten()[gone], base[gone])
    entry.restore()
    assert torch.equal(entry.weight.detach().flatten(), base)


def test_schedule_replaces_all_first_then_less_and_less() -> None:
    schedule = Schedule(period=6, estimation_steps=2, initial_rate=0.2, kind="linear", total_steps=20)
    assert [step for step in range(1, 21) if schedule.reselects_after(step)] == [2, 8, 14, 20]
    assert [schedule.phase_step(step) for step in (1, 2, 3, 6, 7, 8)] == [1, 2, 0, 0, 1, 2]
    assert [schedule.count(step, 1000) for step in (2, 8, 14, 20)] == [1000, 120, 60, 0]


def test_adam_with_equal_ages_is_torchs_adam() -> None:
    """With eps = 0, where the two differ by a factor of the bias correction."""
    values = [nn.Parameter(torch.randn(50, dtype=torch.float64)) for _ in range(2)]
    values[1].data.copy_(values[0].data)
    ours = SparseAdamW(values[:1], lr=1e-2, eps=0.0)
    theirs = torch.optim.Adam(values[1:], lr=1e-2, eps=0.0)
    for _ in range(100):
        grad = torch.randn(50, dtype=torch.float64)
        for parameter, optimizer in zip(values, (ours, theirs), strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(values[0], values[1], atol=1e-12, rtol=0)


def test_grown_entries_start_from_their_seeds_and_others_keep_their_age() -> None:
    values = nn.Parameter(torch.zeros(3))
    optimizer = SparseAdamW([values], lr=1e-2)
    for _ in range(4):
        values.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
    moments = optimizer.state[values]["exp_avg"].clone()
    seeds = EntrySeeds(torch.tensor([1]), torch.tensor([0.5]), torch.tensor([0.25]), age=2)
    optimizer.remap(values, torch.tensor([2, -1, 0]), seeds)
    state = optimizer.state[values]
    assert state["age"].tolist() == [4, 2, 4]
    assert state["exp_avg"].tolist() == [moments[2].item(), 0.5, moments[0].item()]


def test_sm3_matches_a_loop_over_entries() -> None:
    entry = _entry(torch.float64)
    optimizer = SM3([entry], lr=0.1, weight_decay=0.01)
    rows, columns = [0.0] * 24, [0.0] * 16
    expected = entry.values.detach().clone()
    for _ in range(5):
        entry.values.grad = torch.randn_like(entry.values)
        fed_rows, fed_columns = [0.0] * 24, [0.0] * 16
        for place, position in enumerate(entry.placed.tolist()):
            row, column = divmod(position, 16)
            grad = float(entry.values.grad[place])
            total = min(rows[row], columns[column]) + grad * grad
            fed_rows[row], fed_columns[column] = max(fed_rows[row], total), max(fed_columns[column], total)
            moved = float(expected[place]) - 0.1 * grad / (total + 1e-8) ** 0.5
            expected[place] = moved - 0.1 * 0.01 * moved
        rows = [max(pair) for pair in zip(rows, fed_rows, strict=True)]
        columns = [max(pair) for pair in zip(columns, fed_columns, strict=True)]
        optimizer.step()
    torch.testing.assert_close(entry.values.detach(), expected, atol=1e-12, rtol=0)
