"""The gradient of a few entries of a linear layer, exactly, by a few small products instead of the dense one.

The dense gradient of y = x @ W.T is G = g.T @ x, (out, in), with g = dL/dy, (tokens, out), x (tokens, in). An entry
G[i, j] = sum_t g[t, i] x[t, j] needs column i of g and column j of x alone. So for any set of rows R and any set of
columns C, g[:, R].T @ x[:, C] holds every G[i, j] with i in R and j in C, with the same terms as the dense product.

Trained entries cluster in few rows and columns. `group_rows` splits them three ways. Those of the columns with the most
of them are in one product of all rows. The rows, sorted by their number of entries, are cut into groups, and of each
the other entries are in a product of these rows and the columns they touch, or of these rows and all columns; or, where
there are few, each is a dot product of its own. More groups multiply less, but copy more numbers: a product with all
rows or all columns has one factor as it is, and to gather a number takes as long as some 20 multiplications on a CPU
core, and by the data sheets of GPUs some 500 there. So on a CPU there are many groups, and on a GPU a few rows, a few
columns and single entries. The split is the cheapest by the costs of the machine, found exactly among `MOST_SLICES`
candidate cuts on either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sparse.grouping import Block, Grouping, lay_out

MOST_SLICES = 16  # candidate cuts; the cost of a plan is flat around its optimum
LEAST_SIDE = 16  # a product with a shorter side takes no less time: kernels work in tiles
PLACING_CALLS = 4  # operations that find sampled entries and put what they give in their places
ON_GPU = 8  # sides are multiples of it there, as NVIDIA's guides ask for 16-bit products; not measured here


@dataclass(frozen=True)
class GradientCosts:
    """Seconds that the parts of a gradient take on one device and dtype: for one token, or a call."""

    multiply_s: float
    """One multiplication and addition of a dense product."""
    narrow_s: float
    """The same of a product with a few rows or columns."""
    gather_s: float
    """One number copied by a gather of columns, the reading of its neighbours included."""
    sampled_s: float
    """One multiplication and addition of a sampled product, its two gathers included."""
    call_s: float
    """One product, however small."""
    sampled_call_s: float
    """Sampled products, however few."""


def group_rows(
    parts: Sequence[Tensor], shape: tuple[int, int], tokens: int, costs: GradientCosts, multiple: int = 1
) -> tuple[Grouping, float]:
    """Return the cheapest way to the entries of all `parts` by products, and the seconds it takes by `costs`.

    Args:
        parts: (n,) flat positions in the weight each, in any order, n >= 1 in all; int32 or int64.
        shape: (out_features, in_features).
        tokens: of a micro-batch.
        costs: of the device and dtype.
        multiple: of which the sides of all products are, in a weight whose own sides are; rows and columns that are
            added for it hold no entries.
    """
    indices = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts])
    row, column = indices // shape[1], indices % shape[1]
    (rows, row_cuts), (columns, column_cuts) = (
        _slices(side, length, multiple) for side, length in zip((row, column), shape, strict=True)
    )
    slice_of = torch.bucketize(_inverse(rows), torch.tensor(row_cuts[1:], device=indices.device), right=True)
    touched = torch.bincount(slice_of[row] * shape[1] + column, minlength=(len(row_cuts) - 1) * shape[1])
    touched = touched.view(-1, shape[1])
    hot, runs, cost = _cheapest(_Counts.of(touched[:, columns], row_cuts, column_cuts), shape, tokens, costs)
    hot_columns = columns[: column_cuts[hot]]
    blocks = [_block(touched, rows, row_cuts, hot_columns, run, multiple) for run in runs]
    return lay_out(blocks, hot_columns.sort().values, shape, parts), cost


def _slices(side: Tensor, length: int, multiple: int) -> tuple[Tensor, list[int]]:
    """Return rows (or columns), those with the most entries first, (length,), and where to cut, up to the last touched.

    Cuts lie closer where there are many entries, and at multiples.
    """
    count = torch.bincount(side, minlength=length)
    touched = int((count > 0).sum())
    ends = (-(-round(touched * (k / MOST_SLICES) ** 2) // multiple) * multiple for k in range(MOST_SLICES + 1))
    return count.argsort(descending=True, stable=True), sorted({min(end, length) for end in ends})


def _inverse(order: Tensor) -> Tensor:
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank


@dataclass(frozen=True)
class _Counts:
    """What any run of row slices, from a to b - 1, leaves outside the first h columns: [h, a, b], on the CPU, fp64.

    `entries`: its trained entries; `widths`: columns that they touch; `heights`: [a, b] its rows; `hot`: [h] columns.
    """

    entries: Tensor
    widths: Tensor
    heights: Tensor
    hot: Tensor

    @classmethod
    def of(cls, touched: Tensor, row_cuts: list[int], column_cuts: list[int]) -> "_Counts":
        """Count. touched: (slices, in) entries, columns in order; cuts of both sides, from 0."""
        (slices, width), hots, device = touched.shape, len(column_cuts), touched.device
        outside = torch.arange(width, device=device)[:, None] >= torch.tensor(column_cuts, device=device)
        before = torch.zeros(slices + 1, hots, dtype=torch.float64, device=device)
        before[1:] = (touched.double() @ outside.double()).cumsum(0)
        # A run from a to b - 1 touches a column if the next slice from a on that does so is one before b.
        number = torch.arange(slices, device=device)[:, None]
        following = torch.where(touched > 0, number, slices).flip(0).cummin(0).values.flip(0)
        place = (number * (slices + 1) + following) * hots + outside.sum(1) - 1
        counted = torch.bincount(place.flatten(), minlength=slices * (slices + 1) * hots).view(slices, slices + 1, hots)
        widths = torch.zeros(slices, slices + 1, hots, dtype=torch.float64, device=device)
        widths[:, 1:] = counted.flip(2).cumsum(2).flip(2).cumsum(1)[:, :-1]
        found = torch.stack((before - before[:-1, None], widths)).permute(0, 3, 1, 2)
        entries, widths = found.cpu()  # one look from the host
        cuts = torch.tensor(row_cuts, dtype=torch.float64)
        hot = torch.tensor(column_cuts, dtype=torch.float64)
        return cls(entries, widths, cuts[None, :] - cuts[:-1, None], hot)


@dataclass(frozen=True)
class _Run:
    """Row slices from `first` to `end` - 1, and what becomes of their entries outside the hot columns."""

    first: int
    end: int
    way: str  # of _WAYS


_WAYS = ("touched columns", "all columns", "sampled")


def _cheapest(
    counts: _Counts, shape: tuple[int, int], tokens: int, costs: GradientCosts
) -> tuple[int, list[_Run], float]:
    """Return the number of the cut of the hot columns, the runs of rows, and their cost: the least of all."""
    out_features, in_features = shape

    def product_s(height: Tensor, width: Tensor) -> Tensor:
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        gathered = torch.where(height < out_features, height, 0.0) + torch.where(width < in_features, width, 0.0)
        multiplied = costs.narrow_s * short.clamp(min=LEAST_SIDE) * long
        return costs.call_s + tokens * (multiplied + costs.gather_s * gathered)

    heights = counts.heights.expand_as(counts.widths)
    ways = (
        product_s(heights, counts.widths),
        product_s(heights, torch.full_like(heights, in_features)),
        costs.sampled_call_s + PLACING_CALLS * costs.call_s + tokens * costs.sampled_s * counts.entries,
    )
    run_s, way = torch.stack(ways).min(0)
    run_s = torch.where(counts.entries > 0, run_s, 0.0)
    hot_s = product_s(torch.full_like(counts.hot, out_features), counts.hot).where(counts.hot > 0, 0.0)
    slices = heights.shape[1]
    best, begins = [hot_s], []  # for each number of slices: the cost by the hot columns, and where the last run begins
    for end in range(1, slices + 1):
        least, begin = (torch.stack(best, 1) + run_s[:, :end, end]).min(1)
        best.append(least)
        begins.append(begin)
    hot = int(best[-1].argmin())
    runs, end = [], slices
    while end:
        first = int(begins[end - 1][hot])
        if counts.entries[hot, first, end]:
            runs.append(_Run(first, end, _WAYS[int(way[hot, first, end])]))
        end = first
    return hot, runs[::-1], float(best[-1][hot])


def _block(touched: Tensor, rows: Tensor, row_cuts: list[int], hot_columns: Tensor, run: _Run, multiple: int) -> Block:
    """Return rows and columns of a run. touched: (slices, in) entries; rows: in order; hot_columns: (hot,)."""
    here = rows[row_cuts[run.first] : row_cuts[run.end]].sort().values
    if run.way == "sampled":
        return Block(here, None)
    wanted = touched[run.first : run.end].sum(0) > 0
    wanted[hot_columns] = False
    if run.way == "all columns":
        wanted[:] = True
    columns = wanted.nonzero().flatten()
    others = wanted.logical_not().nonzero().flatten()[: -columns.numel() % multiple]
    return Block(here, torch.cat((columns, others)).sort().values)
