"""SM3-II over the active entries of a weight (arXiv:1901.11150), the optimizer of SpIEL-MA (arXiv:2401.16405, 3.3).

A weight of r rows and c columns has r + c accumulators instead of two moments an entry. Only active entries feed them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.sparse.entries import ActiveEntries

SM3_EPS = 1e-8


def rows_and_columns(entry: ActiveEntries) -> tuple[Tensor, Tensor]:
    """Return the row and the column, (num_active,) int64 each, of every active entry.

    A weight of more than two dimensions is seen as a matrix whose columns are its last dimension.
    """
    positions = entry.placed.long()
    width = entry.weight.shape[-1]
    return positions // width, positions % width


def sm3_update(grad: Tensor, row_max: Tensor, column_max: Tensor, row: Tensor, column: Tensor, eps: float) -> Tensor:
    """Return the preconditioned gradient of the active entries and raise the accumulators, in place.

    u = min(r_i, c_j) + g^2, r_i = max(r_i, u), c_j = max(c_j, u), result g / sqrt(u + eps).

    Args:
        grad: (num_active,) gradient of the values.
        row_max: (rows,) accumulators r.
        column_max: (columns,) accumulators c.
        row: (num_active,) int64 row of each entry.
        column: (num_active,) int64 column of each entry.
        eps: added under the root.
    """
    accumulated = torch.minimum(row_max[row], column_max[column]) + grad.square()
    row_max.scatter_reduce_(0, row, accumulated, reduce="amax")
    column_max.scatter_reduce_(0, column, accumulated, reduce="amax")
    return grad / (accumulated + eps).sqrt()


class SM3(torch.optim.Optimizer):
    """SM3-II without momentum over the values of a delta; weight decay comes after the update.

    The accumulators belong to the rows and columns of a weight, so they stay when entries are dropped and grown.
    """

    def __init__(
        self, entries: Iterable[ActiveEntries], lr: float, eps: float = SM3_EPS, weight_decay: float = 0.0
    ) -> None:
        """Prepare accumulators of zero, (rows,) and (columns,) a weight, in the dtype of its values."""
        self._entries: Mapping[nn.Parameter, ActiveEntries] = {entry.values: entry for entry in entries}
        super().__init__(list(self._entries), {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for values, entry in self._entries.items():
            width = entry.weight.shape[-1]
            self.state[values] = {
                "row_max": values.new_zeros(entry.weight.numel() // width).detach(),
                "column_max": values.new_zeros(width).detach(),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every value that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is None:
                    continue
                state = self.state[values]
                row, column = rows_and_columns(self._entries[values])
                update = sm3_update(values.grad, state["row_max"], state["column_max"], row, column, group["eps"])
                values.sub_(group["lr"] * update)
                values.sub_(group["lr"] * group["weight_decay"] * values)


def grow_by_momenta(row_max: Tensor, column_max: Tensor, active: Tensor, count: int) -> Tensor:
    """Return up to `count` flat positions with the largest r_i c_j that are not active: SpIEL-MA's growth.

    The outer product is never built: with the columns sorted, row i holds the first searchsorted(c, t / r_i) of them
    above a threshold t, and t is bisected until enough entries are above it. Extra memory: of the order of
    count + len(active).

    Args:
        row_max: (rows,) accumulators r, not negative.
        column_max: (columns,) accumulators c, not negative.
        active: (num_active,) positions that cannot grow, those being dropped among them.
        count: positions wanted.

    Returns:
        At most `count` positions, int64, unsorted; fewer where fewer products are positive.
    """
    rows, columns = row_max.double(), column_max.double()
    ordered, column_of = columns.sort(descending=True)
    wanted = count + active.numel()
    threshold = _threshold(rows, ordered, wanted)
    per_row = _above(rows, ordered, threshold)
    starts = per_row.cumsum(0) - per_row
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), per_row)
    column = column_of[torch.arange(len(row), device=rows.device) - starts[row]]
    positions = row * len(columns) + column
    positions = positions[~torch.isin(positions, active.long())]
    width = len(columns)
    products = rows[positions // width] * columns[positions % width]
    return positions[products.topk(min(count, len(positions)), sorted=False).indices]


def _above(rows: Tensor, ordered: Tensor, threshold: float) -> Tensor:
    """Count, for each row, the columns with r_i c_j >= threshold > 0; `ordered` is descending."""
    limits = torch.where(rows > 0, threshold / rows, torch.inf)
    return torch.searchsorted(-ordered, -limits, right=True)


def _threshold(rows: Tensor, ordered: Tensor, wanted: int) -> float:
    """Return a threshold above which at least `wanted` products lie and few more; the least positive one at least."""
    positive_rows, positive_columns = rows[rows > 0], ordered[ordered > 0]
    if not len(positive_rows) or not len(positive_columns):
        return float("inf")
    low = float(positive_rows.min() * positive_columns.min())  # every positive product is at least this
    high = float(rows.max() * ordered[0])
    for _ in range(64):
        middle = (low * high) ** 0.5
        enough = int(_above(rows, ordered, middle).sum()) >= wanted
        low, high = (middle, high) if enough else (low, middle)
        if high / low < 1 + 1e-9:
            break
    return low
