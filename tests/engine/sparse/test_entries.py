"""Trained entries of one weight that move: what was learnt stays, and the base comes back bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from engine.sparse.entries import ActiveEntries


def _trained(dtype: torch.dtype, *, compact: bool = False) -> tuple[ActiveEntries, Tensor]:
    base = torch.randn(12, 8).to(dtype)
    entry = ActiveEntries("w", nn.Parameter(base.clone()), 20, compact=compact)
    entry.place(torch.randperm(96)[:20].sort().values.int(), 0.1 * torch.randn(20))
    entry.write_back()
    return entry, base


KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]


@pytest.mark.parametrize("count", [20, 11, 30])
@pytest.mark.parametrize(("dtype", "compact"), KINDS)
def test_moving_keeps_every_change_and_the_weight(dtype: torch.dtype, compact: bool, count: int) -> None:
    entry, base = _trained(dtype, compact=compact)
    expected = torch.zeros(96)
    for _ in range(3):
        expected[entry.placed.long()] = entry.read_values()
        weight, values = entry.weight.detach().clone(), entry.read_values().clone()
        source = entry.move(torch.randperm(96)[:count].sort().values.int())
        assert torch.equal(entry.weight, weight)
        assert torch.equal(entry.read_values()[source >= 0], values[source[source >= 0]])
        indices, changes = entry.change()
        assert torch.equal(indices, indices.unique())
        assert torch.equal(torch.zeros(96).index_copy(0, indices.long(), changes), expected)
        entry.update_values(lambda values: values.add_(0.01))
        entry.write_back()
    entry.restore()
    assert torch.equal(entry.weight, base)


@pytest.mark.parametrize("compact", [False, True])
def test_settled_entries_come_back_with_write_back_and_through_a_checkpoint(compact: bool) -> None:
    entry, base = _trained(torch.bfloat16, compact=compact)
    entry.move(torch.arange(0, 40, 2, dtype=torch.int32))
    tuned, state = entry.weight.detach().clone(), entry.state()
    entry.restore()
    entry.write_back()
    assert torch.equal(entry.weight, tuned)
    assert "settled_values" in state
    again = ActiveEntries("w", nn.Parameter(base.clone()), 20, compact=compact)
    again.load_state(state)
    again.write_back()
    assert torch.equal(again.weight, tuned)


@pytest.mark.parametrize(("dtype", "compact"), KINDS)
def test_placing_another_number_of_entries_starts_their_values_at_zero(dtype: torch.dtype, compact: bool) -> None:
    entry, base = _trained(dtype, compact=compact)
    entry.place(torch.arange(7, dtype=torch.int32))
    assert entry.num_active == 7
    assert entry.read_values().tolist() == [0.0] * 7
    assert torch.equal(entry.weight, base)
