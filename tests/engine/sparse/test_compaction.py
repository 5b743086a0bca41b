"""Ways to the gradient of a few entries: all of them are the entries of the dense product."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.sparse.compaction import ON_GPU, GradientCosts, group_rows
from engine.sparse.gradient_costs import DEFAULT_COSTS, costs_for
from engine.sparse.gradient_ways import GradientPlan, Way, Workspace, plan_gradient, values_gradients
from engine.sparse.selection import select_topk_indices

WAYS: tuple[Way, ...] = ("dense", "compaction", "sampled")
# Multiplications alone: as many groups as there are candidate cuts.
MULTIPLIES_ONLY = GradientCosts(multiply_s=1.0, gather_s=0.0, sampled_s=1.0, call_s=0.0)


def _factors(shape: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, shape[0], dtype=dtype), torch.randn(tokens, shape[1], dtype=dtype)


def _clustered(shape: tuple[int, int], count: int, spread: float) -> Tensor:
    rows, columns = torch.randn(shape[0], 1), torch.randn(1, shape[1])
    return select_topk_indices(torch.randn(shape) * torch.exp(spread * (rows + columns)), count)


@pytest.mark.parametrize("costs", [DEFAULT_COSTS, MULTIPLIES_ONLY], ids=["default", "many groups"])
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
            plan = plan_gradient(indices, shape, tokens, costs, way)
            found = values_gradients(grad_y, x, plan, [indices], Workspace())[0]
            torch.testing.assert_close(found, dense[indices.long()], atol=1e-12, rtol=0)


@pytest.mark.parametrize("costs", [DEFAULT_COSTS, MULTIPLIES_ONLY], ids=["default", "many groups"])
@pytest.mark.parametrize(
    ("shape", "count"), [((96, 160), 1), ((96, 160), 150), ((96, 160), 9000), ((7, 30), 9), ((30, 9), 40)], ids=str
)
def test_sides_of_products_for_a_gpu_are_multiples_where_those_of_the_weight_are(
    shape: tuple[int, int], count: int, costs: GradientCosts
) -> None:
    grad_y, x = _factors(shape, 12)
    indices = _clustered(shape, count, 1.0)
    grouping, _ = group_rows(indices, shape, 12, costs, ON_GPU)
    for sides in grouping.sizes:
        assert all(side % ON_GPU == 0 or whole % ON_GPU for side, whole in zip(sides, shape, strict=True))
    plan = GradientPlan("compaction", shape, count, grouping)
    (found,) = values_gradients(grad_y, x, plan, [indices], Workspace())
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


def test_positions_may_come_unsorted_and_twice() -> None:
    grad_y, x = _factors((20, 30), 6)
    indices = torch.tensor([599, 3, 3, 40, 0, 312], dtype=torch.int32)
    plan = plan_gradient(indices, (20, 30), 6, MULTIPLIES_ONLY, "compaction")
    found = values_gradients(grad_y, x, plan, [indices], Workspace())[0]
    torch.testing.assert_close(found, (grad_y.T @ x).flatten()[indices.long()], atol=1e-12, rtol=0)


def test_tokens_may_be_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sparse.gradient_ways.GATHERED_NUMEL", 100)
    grad_y, x = _factors((20, 30), 50)
    indices = _clustered((20, 30), 40, 1.0)
    plan = plan_gradient(indices, (20, 30), 50, DEFAULT_COSTS, "compaction")
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
    plan = plan_gradient(indices, (64, 96), 300, DEFAULT_COSTS, way)
    (own,) = values_gradients(half, other, plan, [indices], Workspace())
    torchs = (half.T @ other).flatten()[indices.long()]
    assert own.dtype == torch.float32
    assert (own - truth).norm() <= 1.02 * (torchs - truth).norm()


def test_clustered_entries_leave_little_and_whole_columns_exactly_theirs() -> None:
    shape = (200, 300)
    scattered, clustered = (
        plan_gradient(_clustered(shape, 600, spread), shape, 512, DEFAULT_COSTS, "compaction").multiplied
        for spread in (0.0, 1.0)
    )
    assert clustered < 0.15 * 200 * 300 < 0.5 * scattered
    columns = torch.zeros(shape, dtype=torch.bool)
    columns[:, [3, 70, 299]] = True
    grouping, _ = group_rows(columns.flatten().nonzero().flatten().int(), shape, 512, DEFAULT_COSTS)
    assert grouping.numel == 600
    assert grouping.rows is None
    assert grouping.columns is not None


def test_auto_takes_what_is_cheapest() -> None:
    few, many = torch.tensor([5, 9000], dtype=torch.int32), torch.arange(10_000, dtype=torch.int32)
    cheap_samples = GradientCosts(multiply_s=1e-12, gather_s=1e-9, sampled_s=1e-12, call_s=0.0)
    assert plan_gradient(few, (100, 100), 64, cheap_samples, "auto").way == "sampled"
    assert plan_gradient(many, (100, 100), 64, DEFAULT_COSTS, "auto").way == "dense"
    assert plan_gradient(_clustered((400, 400), 1600, 2.0), (400, 400), 512, DEFAULT_COSTS, "auto").way == "compaction"


def test_workspace_is_one_buffer_until_it_is_released() -> None:
    workspace = Workspace()
    large = workspace.take(100, torch.ones(1))
    assert workspace.take(60, torch.ones(1)).data_ptr() == large.data_ptr()
    assert workspace.take(60, torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    workspace.release()
    assert workspace.take(5, torch.ones(1)).untyped_storage().nbytes() == 20


def test_costs_are_measured_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    assert costs_for(cpu, torch.float32, 1000) == DEFAULT_COSTS
    first = costs_for(cpu, torch.float32, 2**20)
    assert first != DEFAULT_COSTS
    assert all(0 < value < 1e-3 for value in vars(first).values())
    assert costs_for(cpu, torch.float32, 2**20) == first


def test_costs_are_fixed_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert costs_for(torch.device("cpu"), torch.float32, 2**20) == DEFAULT_COSTS
