"""Trained entries of one weight that move: what was learnt stays, and the base comes back bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from engine.sparse.entries import ActiveEntries


def _trained(dtype: torch.dtype) -> tuple[ActiveEntries, Tensor]:
    base = torch.randn(12, 8).to(dtype)
    entry = ActiveEntries("w", nn.Parameter(base.clone()), 20)
    entry.place(torch.randperm(96)[:20].sort().values.int())
    with torch.no_grad():
        entry.values.normal_(std=0.1)
    entry.write_back()
    return entry, base


@pytest.mark.parametrize("count", [20, 11, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_keeps_every_change_and_the_weight(dtype: torch.dtype, count: int) -> None:
    entry, base = _trained(dtype)
    expected = torch.zeros(96)
    for _ in range(3):
        expected[entry.placed.long()] = entry.values.detach()
        weight, values = entry.weight.detach().clone(), entry.values.detach().clone()
        source = entry.move(torch.randperm(96)[:count].sort().values.int())
        assert torch.equal(entry.weight, weight)
        assert torch.equal(entry.values[source >= 0], values[source[source >= 0]])
        indices, changes = entry.change()
        assert torch.equal(indices, indices.unique())
        assert torch.equal(torch.zeros(96).index_copy(0, indices.long(), changes), expected)
        with torch.no_grad():
            entry.values.add_(0.01)
        entry.write_back()
    entry.restore()
    assert torch.equal(entry.weight, base)


def test_settled_entries_come_back_with_write_back_and_through_settle() -> None:
    entry, base = _trained(torch.bfloat16)
    entry.move(torch.arange(0, 40, 2, dtype=torch.int32))
    tuned, settled, values = entry.weight.detach().clone(), entry.settled, entry.values.detach().clone()
    entry.restore()
    entry.write_back()
    assert torch.equal(entry.weight, tuned)
    again = ActiveEntries("w", nn.Parameter(base.clone()), 20)
    again.place(entry.placed)
    again.values.data.copy_(values)
    assert settled is not None
    again.settle(settled.indices, settled.values)
    again.write_back()
    assert torch.equal(again.weight, tuned)


def test_placing_another_number_of_entries_starts_their_values_at_zero() -> None:
    entry, base = _trained(torch.float32)
    entry.place(torch.arange(7, dtype=torch.int32))
    assert entry.num_active == 7
    assert entry.values.tolist() == [0.0] * 7
    assert torch.equal(entry.weight, base)
