"""Positions by rows: the same numbers in half the memory, and flat where that would not help."""

import pytest
import torch

from engine.sparse.positions import FlatPositions, RowPositions, pack_positions


@pytest.mark.parametrize("shape", [(64, 300), (5, 8, 16), (1, 65_536), (300,)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_rows_give_the_flat_positions_back(shape: tuple[int, ...], density: float) -> None:
    numel = torch.Size(shape).numel()
    indices = torch.randperm(numel)[: int(density * numel)].sort().values.int()
    packed = pack_positions(indices, shape)
    assert isinstance(packed, RowPositions)
    assert (packed.flat().dtype, packed.columns.dtype) == (torch.int32, torch.uint16)
    assert torch.equal(packed.flat(), indices)


def test_rows_without_entries_and_whole_rows_are_told_apart() -> None:
    indices = torch.cat((torch.arange(100, 200), torch.tensor([399]), torch.arange(700, 800))).int()
    assert torch.equal(pack_positions(indices, (9, 100)).flat(), indices)


def test_positions_beyond_32_bit_keep_64() -> None:
    shape, indices = (2**20, 4096), torch.tensor([3, 2**31 + 5, 2**32 - 1]).repeat_interleave(2**20)
    packed = RowPositions(2**32, (indices % 4096).to(torch.uint16), torch.zeros(1).int(), 4096, torch.int64)
    assert packed.columns.nbytes == 2 * len(indices)
    few = pack_positions(indices[:: 2**20], shape)
    assert few.flat().dtype == torch.int64


@pytest.mark.parametrize(("shape", "count"), [((2, 65_537), 1000), ((4096, 64), 4096), ((100,), 1)])
def test_positions_stay_flat_where_rows_are_too_wide_or_take_more(shape: tuple[int, ...], count: int) -> None:
    indices = torch.randperm(torch.Size(shape).numel())[:count].sort().values.int()
    packed = pack_positions(indices, shape)
    assert isinstance(packed, FlatPositions)
    assert packed.flat() is indices
