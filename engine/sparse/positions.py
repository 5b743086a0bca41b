"""Where the trained entries of one weight are: flat positions of 4 bytes, or columns row by row, 2 bytes an entry.

By rows (CSR, compressed sparse rows) an entry is its column, uint16, and each row of the weight adds 4 bytes for where
its entries begin. A weight of more than two dimensions is seen as a matrix whose columns are its last dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MOST_COLUMNS = 2**16  # that uint16 tells apart
TILE = 4096  # entries of the flattened weight, of which a kernel makes one tile after another


@dataclass(frozen=True)
class Positions(ABC):
    """Positions of one placement in a weight of `numel` entries; another placement has an object of its own."""

    numel: int

    @abstractmethod
    def flat(self) -> Tensor:
        """Return flat positions, (num_active,) sorted and unique."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What lies in memory."""

    @cached_property
    def tiles(self) -> Tensor:
        """How many positions lie before each tile, and how many there are, (ceil(numel / TILE) + 1,) int32.

        Made when a kernel first asks, and kept: 4 bytes for every `TILE` entries of the weight.
        """
        flat = self.flat()
        edges = torch.arange(0, self.numel + TILE, TILE, dtype=torch.int64, device=flat.device)
        edges = edges.clamp_(max=self.numel).to(flat.dtype)
        return torch.searchsorted(flat, edges, out_int32=flat.numel() < 2**31)


@dataclass(frozen=True)
class FlatPositions(Positions):
    """`indices`: (num_active,) positions in the flattened weight, sorted and unique."""

    indices: Tensor

    def flat(self) -> Tensor:
        """Return the positions themselves."""
        return self.indices

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What lies in memory."""
        return (self.indices,)


@dataclass(frozen=True)
class RowPositions(Positions):
    """The same by rows.

    `columns`: (num_active,) uint16; `starts`: (rows + 1,) int32, the entries of row i are `starts[i]` to
    `starts[i + 1]`; `width`: columns of the weight; `dtype`: of flat positions in it.
    """

    columns: Tensor
    starts: Tensor
    width: int
    dtype: torch.dtype

    def flat(self) -> Tensor:
        """Return flat positions, (num_active,) sorted and unique: a new tensor."""
        rows = self.starts.numel() - 1
        before = torch.arange(0, rows * self.width, self.width, dtype=self.dtype, device=self.starts.device)
        flat = torch.repeat_interleave(before, self.starts.diff(), output_size=self.columns.numel())
        return flat.add_(self.columns.to(self.dtype))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What lies in memory."""
        return self.columns, self.starts


def pack_positions(indices: Tensor, shape: Sequence[int]) -> Positions:
    """Return the positions in the smaller of both ways; flat ones where a row is too wide.

    Args:
        indices: (n,) flat positions, sorted and unique.
        shape: of the weight.
    """
    width = shape[-1]
    numel = torch.Size(shape).numel()
    rows = numel // width
    if width > MOST_COLUMNS or 2 * indices.numel() + 4 * (rows + 1) >= indices.nbytes:
        return FlatPositions(numel, indices)
    begins = torch.arange(0, (rows + 1) * width, width, dtype=torch.int64, device=indices.device)
    starts = torch.searchsorted(indices, begins.to(indices.dtype), out_int32=True)
    return RowPositions(numel, (indices % width).to(torch.uint16), starts, width, indices.dtype)
