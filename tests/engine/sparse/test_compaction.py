"""Ways to the gradient of a few entries: all of them are the entries of the dense product."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.sparse.compaction import ON_GPU, GradientCosts, group_rows
from engine.sparse.gradient_costs import DEFAULT_COSTS, costs_for, forget_costs
from engine.sparse.gradient_ways import GradientPlan, Way, Workspace, plan_gradient, values_gradients
from engine.sparse.selection import select_topk_indices

WAYS: tuple[Way, ...] = ("dense", "compaction", "sampled")
# Multiplications alone: as many groups as there are candidate cuts. Then dear gathers, as on a GPU; and cheap samples.
MULTIPLIES_ONLY = GradientCosts(
    multiply_s=1.0, narrow_s=1.0, gather_s=0.0, sampled_s=1e9, call_s=0.0, sampled_call_s=0.0
)
DEAR_GATHERS = replace(MULTIPLIES_ONLY, gather_s=40.0, sampled_s=12.0)
CHEAP_SAMPLES = replace(MULTIPLIES_ONLY, sampled_s=1.5)
COSTS = {
    "default": DEFAULT_COSTS,
    "many groups": MULTIPLIES_ONLY,
    "cross": DEAR_GATHERS,
    "single entries": CHEAP_SAMPLES,
}


def _factors(shape: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, shape[0], dtype=dtype), torch.randn(tokens, shape[1], dtype=dtype)


def _clustered(shape: tuple[int, int], count: int, spread: float) -> Tensor:
    rows, columns = torch.randn(shape[0], 1), torch.randn(1, shape[1])
    return select_topk_indices(torch.randn(shape) * torch.exp(spread * (rows + columns)), count)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("shape", "count", "tokens"),
    [((40, 24), 9, 7), ((24, 40), 500, 7), ((1, 30), 5, 3), ((30, 1), 5, 3), ((16, 16), 256, 1), ((8, 8), 1, 4)],
    ids=str,
)
def test_every_way_gives_the_entries_of_the_dense_product(
    shape: tuple[int, int], count: int, tokens: int, way: Way, costs: GradientCosts
) -> None:
    grad_y, x = _factors(shape, tokens)
    dense = (grad_y.T @ x).flatten()
    for spread in (0.0, 2.0):
        for dtype in (torch.int32, torch.int64):
            indices = _clustered(shape, count, spread).to(dtype)
            plan = plan_gradient([indices], shape, tokens, costs, way)
            found = values_gradients(grad_y, x, plan, [indices], Workspace())[0]
            torch.testing.assert_close(found, dense[indices.long()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize(
    ("shape", "count"), [((96, 160), 1), ((96, 160), 150), ((96, 160), 9000), ((7, 30), 9), ((30, 9), 40)], ids=str
)
def test_sides_of_products_for_a_gpu_are_multiples_where_those_of_the_weight_are(
    shape: tuple[int, int], count: int, costs: GradientCosts
) -> None:
    grad_y, x = _factors(shape, 12)
    indices = _clustered(shape, count, 1.0)
    grouping, _ = group_rows([indices], shape, 12, costs, ON_GPU)
    for product in grouping.products:
        sides = product.height, product.width
        assert all(side % ON_GPU == 0 or whole % ON_GPU for side, whole in zip(sides, shape, strict=True))
    plan = GradientPlan("compaction" if grouping.products else "sampled", shape, count, grouping)
    (found,) = values_gradients(grad_y, x, plan, [indices], Workspace())
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


def test_positions_may_come_unsorted_and_twice() -> None:
    grad_y, x = _factors((20, 30), 6)
    indices = torch.tensor([599, 3, 3, 40, 0, 312], dtype=torch.int32)
    plan = plan_gradient([indices], (20, 30), 6, MULTIPLIES_ONLY, "compaction")
    found = values_gradients(grad_y, x, plan, [indices], Workspace())[0]
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


def test_tokens_may_be_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sparse.gradient_ways.GATHERED_NUMEL", 100)
    grad_y, x = _factors((20, 30), 50)
    indices = _clustered((20, 30), 40, 1.0)
    plan = plan_gradient([indices], (20, 30), 50, MULTIPLIES_ONLY, "compaction")
    assert plan.grouping is not None
    assert 50 * plan.grouping.gathered > 600
    found = values_gradients(grad_y, x, plan, [indices], Workspace())[0]
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_no_worse_than_torch_itself(way: Way) -> None:
    grad_y, x = _factors((64, 96), 300)
    indices = _clustered((64, 96), 300, 1.0)
    truth = (grad_y.T @ x).flatten()[indices.long()]
    half, other = grad_y.bfloat16(), x.bfloat16()
    plan = plan_gradient([indices], (64, 96), 300, DEFAULT_COSTS, way)
    (own,) = values_gradients(half, other, plan, [indices], Workspace())
    torchs = (half.T @ other).flatten()[indices.long()]
    assert own.dtype == torch.float32
    assert (own - truth).norm() <= 1.02 * (torchs - truth).norm()


def test_clustered_entries_leave_little_and_whole_columns_exactly_theirs() -> None:
    shape = (200, 300)
    scattered, clustered = (
        plan_gradient([_clustered(shape, 600, spread)], shape, 512, DEFAULT_COSTS, "compaction").multiplied
        for spread in (0.0, 1.0)
    )
    assert clustered < 0.15 * 200 * 300 < 0.5 * scattered
    columns = torch.zeros(shape, dtype=torch.bool)
    columns[:, [3, 70, 299]] = True
    grouping, _ = group_rows([columns.flatten().nonzero().flatten().int()], shape, 512, DEFAULT_COSTS)
    assert grouping.numel == 600
    assert grouping.rows is None
    assert grouping.columns is not None


def test_where_gathers_are_dear_whole_rows_and_columns_are_multiplied_and_the_rest_is_sampled() -> None:
    shape = (300, 400)
    indices = _clustered(shape, 4000, 1.0)
    cross, seconds = group_rows([indices], shape, 64, DEAR_GATHERS)
    hot, *runs = cross.products
    assert (hot.height, hot.left) == (300, None)
    assert runs
    assert all((run.width, run.right) == (400, None) for run in runs)
    assert 0 < cross.num_sampled < 2000
    groups, _ = group_rows([indices], shape, 64, MULTIPLIES_ONLY)
    assert groups.num_sampled == 0
    assert cross.gathered < 0.2 * groups.gathered
    multiplied = sum(max(16, min(each.height, each.width)) * max(each.height, each.width) for each in cross.products)
    expected = 64 * (multiplied + 40 * cross.gathered + 12 * cross.num_sampled)
    assert seconds == pytest.approx(expected, rel=0.01)  # one in 255 entries may be sampled besides


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_what_a_split_is_said_to_cost_is_what_its_products_and_entries_do(costs: GradientCosts, spread: float) -> None:
    indices = _clustered((130, 170), 600, spread)
    grouping, seconds = group_rows([indices], (130, 170), 64, costs)
    multiplied = sum(max(16, min(each.height, each.width)) * max(each.height, each.width) for each in grouping.products)
    each_token = (
        costs.narrow_s * multiplied + costs.gather_s * grouping.gathered + costs.sampled_s * grouping.num_sampled
    )
    calls = costs.call_s * len(grouping.products)
    runs = 4 * costs.call_s + costs.sampled_call_s  # of rows whose entries are sampled: one, if any
    expected = 64 * each_token + calls + (runs if grouping.num_sampled else 0.0)
    assert seconds == pytest.approx(expected, rel=0.02)  # one in 255 entries may be sampled besides


def test_single_entries_far_apart_are_found_again() -> None:
    """All but one in 600 are in a whole row, so that a byte cannot say how far it is to the next."""
    shape = (40, 600)
    indices = torch.cat((torch.arange(7 * 600, 9 * 600), torch.tensor([20 * 600 + 5]))).int()
    grouping, _ = group_rows([indices], shape, 64, DEAR_GATHERS)
    assert 1 < grouping.num_sampled < 8
    assert grouping.gaps[0].dtype == torch.uint8
    grad_y, x = _factors(shape, 64)
    (found,) = values_gradients(grad_y, x, GradientPlan("compaction", shape, 1201, grouping), [indices], Workspace())
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_parts_of_the_entries_are_told_apart(costs: GradientCosts) -> None:
    shape = (90, 120)
    together = _clustered(shape, 700, 0.7)
    grad_y, x = _factors(shape, 20)
    parts = [together[::2].int(), together[1::2].int()[:0], together[1::2].int()]
    plan = plan_gradient(parts, shape, 20, costs, "compaction")
    found = values_gradients(grad_y, x, plan, parts, Workspace())
    for each, part in zip(found, parts, strict=True):
        torch.testing.assert_close(each, (grad_y.T @ x).flatten()[part.long()], atol=1e-12, rtol=0)


def test_no_other_split_is_cheaper() -> None:
    """Against all splits into whole rows, whole columns and single entries at the same cuts."""
    shape = (96, 96)
    indices = _clustered(shape, 600, 1.0)
    _, seconds = group_rows([indices], shape, 1, DEAR_GATHERS)
    row, column = indices // 96, indices % 96
    ranks = []
    for side in (row, column):
        order = torch.bincount(side, minlength=96).argsort(descending=True, stable=True)
        ranks.append(order.argsort()[side])
    for rows in range(0, 97, 6):
        for columns in range(0, 97, 6):
            single = int(((ranks[0] >= rows) & (ranks[1] >= columns)).sum())
            products = [side for side in (rows, columns) if side]
            cost = sum(max(16, side) * 96 + 40 * (side if side < 96 else 0) for side in products) + 12 * single
            assert seconds <= 1.05 * cost


def test_auto_takes_what_is_cheapest() -> None:
    few, many = torch.tensor([5, 9000], dtype=torch.int32), torch.arange(10_000, dtype=torch.int32)
    cheap_samples = replace(CHEAP_SAMPLES, gather_s=1e3)
    assert plan_gradient([few], (100, 100), 64, cheap_samples, "auto").way == "sampled"
    assert plan_gradient([many], (100, 100), 64, DEFAULT_COSTS, "auto").way == "dense"
    clustered = _clustered((400, 400), 1600, 2.0)
    assert plan_gradient([clustered], (400, 400), 512, DEFAULT_COSTS, "auto").way == "compaction"


def test_workspace_is_one_buffer_until_it_is_released() -> None:
    workspace = Workspace()
    large = workspace.take(100, torch.ones(1))
    assert workspace.take(60, torch.ones(1)).data_ptr() == large.data_ptr()
    assert workspace.take(60, torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    workspace.release()
    assert workspace.take(5, torch.ones(1)).untyped_storage().nbytes() == 20


def test_costs_are_measured_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    assert costs_for(cpu, torch.float32, 1000) == DEFAULT_COSTS
    first = costs_for(cpu, torch.float32, 2**20)
    assert first != DEFAULT_COSTS
    assert all(0 < value < 1e-3 for value in vars(first).values())
    assert costs_for(cpu, torch.float32, 2**20) == first
    monkeypatch.setattr("engine.sparse.gradient_costs.measure_costs", lambda *_: DEFAULT_COSTS)
    assert costs_for(cpu, torch.float32, 2**20) == first
    forget_costs(cpu)
    assert costs_for(cpu, torch.float32, 2**20) == DEFAULT_COSTS


def test_costs_are_fixed_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPARSE_TUNING_CACHE", str(tmp_path / "file"))
    assert costs_for(torch.device("cpu"), torch.float32, 2**20) == DEFAULT_COSTS
