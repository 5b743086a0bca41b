"""The gradient of a few entries of a linear layer, exactly, by a few small products instead of the dense one.

The dense gradient of y = x @ W.T is G = g.T @ x, (out, in), with g = dL/dy, (tokens, out), x (tokens, in). An entry
G[i, j] = sum_t g[t, i] x[t, j] needs column i of g and column j of x alone. So for any set of rows R and any set of
columns C, g[:, R].T @ x[:, C] holds every G[i, j] with i in R and j in C, with the same terms as the dense product.

Trained entries cluster in few rows and columns. `group_rows` sorts the rows by their number of entries, cuts them into
groups, takes for each group the union C of the columns of its entries, and the product of each group holds all its
entries: with rows R_1 .. R_g, sum |R_k| |C_k| multiplications a token instead of out * in. More groups multiply less
and copy more columns; the cuts are those of the least cost, found exactly among at most `MOST_SLICES` candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SLICES = 16  # candidate cuts; the cost of a plan is flat around its optimum
LEAST_SIDE = 16  # a product with a shorter side takes no less time: kernels work in tiles
ON_GPU = 8  # sides are multiples of it there, as NVIDIA's guides ask for 16-bit products; not measured here


@dataclass(frozen=True)
class GradientCosts:
    """Seconds that the parts of a gradient take on one device and dtype, each for one token, but for `call_s`."""

    multiply_s: float
    """One multiplication and addition of a dense product."""
    gather_s: float
    """One number copied by a gather of columns, the reading of its neighbours included."""
    sampled_s: float
    """One multiplication and addition of a sampled product, its two gathers included."""
    call_s: float
    """One product of a group, however small."""


@dataclass(frozen=True)
class Grouping:
    """Which rows and columns are multiplied, and where in the products, one behind the other, an entry is.

    Entry (i, j) of group k is at `base[i] + place[k, j]`. Memory: of the order of out + groups * in.
    """

    rows: Tensor | None  # (sum of heights,) of the groups one after another; None for all, in one group
    columns: Tensor | None  # (sum of widths,)
    sizes: tuple[tuple[int, int], ...]  # height and width of each group
    base: Tensor  # (out,)
    shift: Tensor  # (out,) what to add to a flat position in the weight to have the one of (k, j) in `place`
    place: Tensor  # (groups * in,)
    in_features: int

    @property
    def numel(self) -> int:
        """Entries of all products."""
        return sum(height * width for height, width in self.sizes)

    @property
    def gathered(self) -> int:
        """Numbers of each token that are copied."""
        return sum(0 if part is None else part.numel() for part in (self.rows, self.columns))

    def multiply(self, grad_y: Tensor, x: Tensor, products: Tensor) -> None:
        """Fill `products`, (numel,), from grad_y, (tokens, out), and x, (tokens, in).

        Rows and columns of all groups are gathered at once: a token's numbers are in the cache then. The shorter side
        of a product comes first, which is the faster order.
        """
        left = grad_y if self.rows is None else grad_y.index_select(1, self.rows)
        right = x if self.columns is None else x.index_select(1, self.columns)
        lefts = left.split([height for height, _ in self.sizes], 1)
        rights = right.split([width for _, width in self.sizes], 1)
        parts = products.split([height * width for height, width in self.sizes])
        for first, second, part in zip(lefts, rights, parts, strict=True):
            if first.shape[1] > second.shape[1]:
                first, second = second, first
            torch.mm(first.T, second, out=part.view(first.shape[1], second.shape[1]))

    def positions(self, indices: Tensor) -> Tensor:
        """Return where the entries at `indices`, (n,) flat positions in the weight, are in the products, (n,)."""
        row = indices // self.in_features
        at = self.shift.index_select(0, row).add_(indices)
        return self.place.index_select(0, at).add_(self.base.index_select(0, row))


def block_cost_s(height: int, width: int, shape: tuple[int, int], tokens: int, costs: GradientCosts) -> float:
    """Return the seconds of one product of `height` rows and `width` columns of a weight of `shape`."""
    gathered = (height if height < shape[0] else 0) + (width if width < shape[1] else 0)
    multiplied = max(LEAST_SIDE, min(height, width)) * max(height, width)
    return costs.call_s + tokens * (costs.multiply_s * multiplied + costs.gather_s * gathered)


def group_rows(
    indices: Tensor, shape: tuple[int, int], tokens: int, costs: GradientCosts, multiple: int = 1
) -> tuple[Grouping, float]:
    """Return the cheapest row groups for the entries at `indices`, and the seconds they take by `costs`.

    Args:
        indices: (n,) flat positions in the weight, in any order, n >= 1; int32 or int64.
        shape: (out_features, in_features).
        tokens: of a micro-batch.
        costs: of the device and dtype.
        multiple: of which the sides of all products are, in a weight whose own sides are; rows and columns that are
            added for it hold no entries.
    """
    out_features, in_features = shape
    row, column = indices // in_features, indices % in_features
    count = torch.bincount(row, minlength=out_features)
    order = count.argsort(descending=True, stable=True)
    touched = int((count > 0).sum())
    ends = (-(-round(touched * (k / MOST_SLICES) ** 2) // multiple) * multiple for k in range(MOST_SLICES + 1))
    cuts = sorted({min(end, out_features) for end in ends})
    slice_of = torch.bucketize(_inverse(order), torch.tensor(cuts[1:], device=indices.device), right=True)
    touch = torch.zeros(len(cuts) - 1, in_features, dtype=torch.int32, device=indices.device)
    touch[slice_of[row], column.long()] = 1
    chosen, cost = _cheapest_cuts(cuts, _union_widths(touch), shape, tokens, costs)
    groups = [(cuts[a], cuts[b], _columns(touch[a:b].amax(0) > 0, multiple)) for a, b in chosen]
    return _grouping(order, groups, shape, indices), cost


def _columns(touched: Tensor, multiple: int) -> Tensor:
    """Return the columns of a mask, (n,) int64 sorted, with others that make their number a multiple."""
    columns = touched.nonzero().flatten()
    others = touched.logical_not().nonzero().flatten()[: -columns.numel() % multiple]
    return torch.cat((columns, others)).sort().values


def _inverse(order: Tensor) -> Tensor:
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank


def _union_widths(touch: Tensor) -> list[list[int]]:
    """Return for slices a <= b how many columns any of a, ..., b touches, at [a][b - a]."""
    widths = [(touch[first:].cumsum(0) > 0).sum(1) for first in range(len(touch))]
    sizes = [len(each) for each in widths]
    return [part.tolist() for part in torch.cat(widths).cpu().split(sizes)]  # one look from the host


def _cheapest_cuts(
    cuts: Sequence[int], widths: list[list[int]], shape: tuple[int, int], tokens: int, costs: GradientCosts
) -> tuple[list[tuple[int, int]], float]:
    """Return the groups, each from slice a to slice b - 1, of the least summed cost, and that cost."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # for each number of slices: the cost, and where the last group begins
    for end in range(1, len(cuts)):
        options = (
            (
                best[begin][0]
                + block_cost_s(cuts[end] - cuts[begin], widths[begin][end - 1 - begin], shape, tokens, costs),
                begin,
            )
            for begin in range(end)
        )
        best.append(min(options))
    groups, end = [], len(cuts) - 1
    while end:
        groups.append((best[end][1], end))
        end = best[end][1]
    return groups[::-1], best[-1][0]


def _grouping(
    order: Tensor, groups: Sequence[tuple[int, int, Tensor]], shape: tuple[int, int], indices: Tensor
) -> Grouping:
    """Lay out the products of `groups`: from and to which place in `order` their rows are, and their columns."""
    out_features, in_features = shape
    base, shift = indices.new_zeros(out_features), indices.new_zeros(out_features)
    place = indices.new_zeros(len(groups), in_features)
    all_rows, all_columns, sizes = [], [], []
    start = 0
    for number, (begin, end, taken) in enumerate(groups):
        rows = order[begin:end].sort().values.to(indices.dtype)
        columns = taken.to(indices.dtype)
        height, width = rows.numel(), columns.numel()
        row_step, column_step = (width, 1) if height <= width else (1, height)
        base[rows.long()] = start + row_step * torch.arange(height, dtype=indices.dtype, device=indices.device)
        shift[rows.long()] = (number - rows) * in_features
        place[number, columns.long()] = column_step * torch.arange(width, dtype=indices.dtype, device=indices.device)
        all_rows.append(rows)
        all_columns.append(columns)
        sizes.append((height, width))
        start += height * width
    rows, columns = torch.cat(all_rows), torch.cat(all_columns)
    whole = len(groups) == 1
    return Grouping(
        None if whole and rows.numel() == out_features else rows,
        None if whole and columns.numel() == in_features else columns,
        tuple(sizes),
        base,
        shift,
        place.flatten(),
        in_features,
    )
