"""Where the trained entries of one weight are: flat positions of 4 bytes, or columns row by row, 2 bytes an entry.

By rows (CSR, compressed sparse rows) an entry is its column, uint16, and each row of the weight adds 4 bytes for where
its entries begin. A weight of more than two dimensions is seen as a matrix whose columns are its last dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_COLUMNS = 2**16  # that uint16 tells apart


@dataclass(frozen=True)
class FlatPositions:
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
class RowPositions:
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


Positions = FlatPositions | RowPositions


def pack_positions(indices: Tensor, shape: Sequence[int]) -> Positions:
    """Return the positions in the smaller of both ways; flat ones where a row is too wide.

    Args:
        indices: (n,) flat positions, sorted and unique.
        shape: of the weight.
    """
    width = shape[-1]
    rows = torch.Size(shape).numel() // width
    if width > MOST_COLUMNS or 2 * indices.numel() + 4 * (rows + 1) >= indices.nbytes:
        return FlatPositions(indices)
    begins = torch.arange(0, (rows + 1) * width, width, dtype=torch.int64, device=indices.device)
    starts = torch.searchsorted(indices, begins.to(indices.dtype), out_int32=True)
    return RowPositions((indices % width).to(torch.uint16), starts, width, indices.dtype)
