"""Whole columns, and rows times columns: as many entries as asked for, those of the largest norms."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.errors import InvalidSpecError
from engine.sparse.attach import attach
from engine.sparse.gradient_costs import DEFAULT_COSTS
from engine.sparse.structure import select_random_structured_indices, select_structured_indices
from engine.spec import RunSpec, Structure
from engine.spec_io import parse_spec

STRUCTURES: tuple[Structure, ...] = ("columns", "rows_x_columns")


def _mask(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape).flatten().index_fill(0, indices.long(), 1.0).view(-1, shape[-1]).bool()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(12, 20), (3, 8, 10), (1, 9), (9, 1), (30,)], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.13, 0.5, 1.0])
def test_count_is_kept_and_the_last_column_alone_is_not_whole(
    structure: Structure, shape: tuple[int, ...], density: float
) -> None:
    scores = torch.randn(shape)
    count = max(1, int(density * scores.numel()))
    generator = torch.Generator().manual_seed(0)
    for indices in (
        select_structured_indices(scores, count, structure),
        select_random_structured_indices(shape, count, structure, generator),
    ):
        assert torch.equal(indices, indices.unique())
        assert len(indices) == count
        per_column = _mask(indices, shape).sum(0)
        assert len(per_column[per_column > 0].unique()) <= 2
        assert int((per_column == per_column.max()).sum()) >= int((per_column > 0).sum()) - 1


def test_columns_are_those_of_the_largest_norms() -> None:
    scores = torch.randn(10, 30) * torch.linspace(0.1, 3.0, 30)
    chosen = _mask(select_structured_indices(scores, 53, "columns"), (10, 30)).sum(0)
    order = scores.norm(dim=0).argsort(descending=True)
    assert chosen[order[:5]].tolist() == [10] * 5
    assert int(chosen[order[5]]) == 3
    kept = scores[:, order[5]].abs()
    taken = _mask(select_structured_indices(scores, 53, "columns"), (10, 30))[:, order[5]]
    assert kept[taken].min() >= kept[~taken].max()


def test_rows_x_columns_finds_a_planted_block() -> None:
    scores = torch.randn(50, 40)
    rows, columns = torch.randperm(50)[:10], torch.randperm(40)[:8]
    scores[rows.view(-1, 1), columns] += 10.0
    mask = _mask(select_structured_indices(scores, 80, "rows_x_columns"), (50, 40))
    assert set(mask.any(1).nonzero().flatten().tolist()) == set(rows.tolist())
    assert set(mask.any(0).nonzero().flatten().tolist()) == set(columns.tolist())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["sift", "random", "magnitude", "fisher"])
def test_methods_choose_structures_that_leave_little_of_the_dense_gradient(
    tiny_llama: LlamaForCausalLM, method: str, structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplies_only = replace(DEFAULT_COSTS, multiply_s=1.0, narrow_s=1.0, gather_s=0.0, sampled_s=1e9, call_s=0.0)
    monkeypatch.setattr("engine.sparse.gradients.costs_for", lambda *_: multiplies_only)
    spec = RunSpec(model="tiny", method=method, structure=structure, density=0.05, gradient_way="compaction")
    tuning = attach(tiny_llama, spec)
    wanted = tuning.num_active
    if method in ("sift", "fisher"):
        tuning.begin_selection(1)
        ids = torch.randint(0, 128, (2, 12))
        tiny_llama(input_ids=ids, labels=ids).loss.backward()
        tuning.end_micro_step()
    assert tuning.num_active == wanted
    assert tuning.gradient_share < 0.08


def test_structure_and_one_budget_over_all_weights_exclude_each_other() -> None:
    with pytest.raises(InvalidSpecError, match="structure must be free with allocation=global"):
        parse_spec({"model": "m", "structure": "columns", "allocation": "global"})
