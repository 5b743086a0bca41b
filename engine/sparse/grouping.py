"""Products of rows and columns of a weight that hold the gradients of its trained entries (`compaction.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sparse.kernels import sampled_products
from engine.sparse.product_layout import Layout, take_entries

MOST_GAP = 255  # between single entries, so that a byte holds it


@dataclass(frozen=True)
class Block:
    """Rows of a weight, (height,) sorted, and the columns of their product, (width,) sorted; None: no product."""

    rows: Tensor
    columns: Tensor | None


@dataclass(frozen=True)
class _Product:
    """Two ranges of gathered rows and columns; None: all of the factor as it is."""

    left: tuple[int, int] | None
    right: tuple[int, int] | None
    height: int
    width: int

    @property
    def numel(self) -> int:
        return self.height * self.width

    @property
    def steps(self) -> tuple[int, int]:
        """From a row to the next in what is computed, and from a column: the shorter side comes first, the faster."""
        return (self.width, 1) if self.height <= self.width else (1, self.height)


@dataclass(frozen=True)
class Grouping:
    """Which rows and columns are multiplied, and which entries are dot products of their own.

    Memory: of the order of out + blocks * in, and a byte for each of these entries.
    """

    rows: Tensor | None  # (n,) that are gathered, block after block
    columns: Tensor | None  # (n,) the hot ones first
    products: tuple[_Product, ...]
    layout: Layout
    gaps: tuple[Tensor, ...]  # of each part of the entries: from one dot product to the next, uint8

    @property
    def numel(self) -> int:
        """Entries of all products."""
        return sum(product.numel for product in self.products)

    @property
    def num_sampled(self) -> int:
        """Entries that are dot products."""
        return sum(each.numel() for each in self.gaps)

    @property
    def gathered(self) -> int:
        """Numbers of each token that are copied."""
        return sum(0 if part is None else part.numel() for part in (self.rows, self.columns))

    def multiply(self, grad_y: Tensor, x: Tensor, products: Tensor) -> None:
        """Fill `products`, (numel,), from grad_y, (tokens, out), and x, (tokens, in).

        Rows and columns of all products are gathered at once: a token's numbers are in the cache then.
        """
        left = grad_y if self.rows is None else grad_y.index_select(1, self.rows)
        right = x if self.columns is None else x.index_select(1, self.columns)
        filled = 0
        for product in self.products:
            first = grad_y if product.left is None else left[:, slice(*product.left)]
            second = x if product.right is None else right[:, slice(*product.right)]
            if product.height > product.width:
                first, second = second, first
            out = products[filled : filled + product.numel].view(first.shape[1], second.shape[1])
            torch.mm(first.T, second, out=out)
            filled += product.numel

    def take(self, products: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the entries at `indices`, (n,) flat positions in the weight, of `products`, (n,) in `dtype`."""
        return take_entries(products, indices, self.layout, dtype)

    def put_sampled(self, found: Tensor, part: int, indices: Tensor, grad_y: Tensor, x: Tensor, at_once: int) -> None:
        """Put the dot products of a part of the entries into `found`, (n,); `at_once`: see `sampled_products`."""
        if self.gaps[part].numel():
            places = self.gaps[part].cumsum(0)
            found.index_copy_(0, places, sampled_products(grad_y, x, indices.index_select(0, places), at_once))


class _Gathered:
    """Rows, or columns, that are gathered for all products together."""

    def __init__(self, length: int) -> None:
        self._length = length  # of the side of the weight
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> tuple[int, int] | None:
        """Return where `part` will be; None where it is the whole side, and is not gathered."""
        if part.numel() == self._length:
            return None
        begin = sum(each.numel() for each in self._parts)
        self._parts.append(part)
        return begin, begin + part.numel()

    def joined(self, dtype: torch.dtype) -> Tensor | None:
        """Return all of them, (n,); None where there are none."""
        return torch.cat(self._parts).to(dtype) if self._parts else None


def lay_out(blocks: Sequence[Block], hot_columns: Tensor, shape: tuple[int, int], parts: Sequence[Tensor]) -> Grouping:
    """Lay products out one behind the other: of all rows and the hot columns, and of each block.

    Args:
        blocks: whose rows are distinct.
        hot_columns: (hot,) sorted; they may be none.
        shape: (out_features, in_features).
        parts: flat positions, (n,) each, of entries in rows of the blocks or in hot columns; what is made is on the
            device and of the dtype of the first.
    """
    like, (out_features, in_features) = parts[0], shape
    rows, columns = _Gathered(out_features), _Gathered(in_features)
    products = []
    if hot_columns.numel():
        products.append(_Product(None, columns.add(hot_columns), out_features, hot_columns.numel()))
    start = sum(product.numel for product in products)
    base, block_of = like.new_zeros(out_features), like.new_full((out_features,), len(blocks))
    place = like.new_zeros(len(blocks) + 1, in_features)  # the last one of rows without a block
    single = like.new_zeros(out_features, dtype=torch.bool)
    for number, block in enumerate(blocks):
        block_of[block.rows] = number
        if block.columns is None:
            single[block.rows] = True
            continue
        height, width = block.rows.numel(), block.columns.numel()
        products.append(product := _Product(rows.add(block.rows), columns.add(block.columns), height, width))
        row_step, column_step = product.steps
        base[block.rows] = _steps(height, row_step, like).add_(start)
        place[number, block.columns] = _steps(width, column_step, like)
        start += product.numel
    shift = block_of.sub_(_steps(out_features, 1, like)).mul_(in_features)
    layout = Layout(base, shift, place.flatten(), *_hot_layout(hot_columns, shape, like), in_features)
    gaps = tuple(_gaps(part, single, layout) for part in parts)
    return Grouping(rows.joined(like.dtype), columns.joined(like.dtype), tuple(products), layout, gaps)


def _steps(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device).mul_(step)


def _hot_layout(hot_columns: Tensor, shape: tuple[int, int], like: Tensor) -> tuple[Tensor | None, int]:
    """Return `hot` and `hot_step` of a `Layout`, by the product of all rows and these columns, the first of all."""
    if not hot_columns.numel():
        return None, 0
    row_step, column_step = _Product(None, None, shape[0], hot_columns.numel()).steps
    hot = like.new_full((shape[1],), -1)
    hot[hot_columns] = _steps(hot_columns.numel(), column_step, like)
    return hot, row_step


def _gaps(indices: Tensor, single: Tensor, layout: Layout) -> Tensor:
    """Return the distances between those of `indices` that no product holds, the first from 0; uint8.

    Where they lie further apart, one that a product holds is counted among them.

    Args:
        indices: (n,) flat positions.
        single: (out,) whether a row is of a block without a product.
        layout: of the products.
    """
    row = indices // layout.in_features
    wanted = single[row]
    if layout.hot is not None:
        wanted &= layout.hot[indices - row * layout.in_features] < 0
    if not wanted.any():
        return indices.new_zeros(0, dtype=torch.uint8)
    wanted[::MOST_GAP] = True
    places = wanted.nonzero().flatten()
    return places.diff(prepend=places.new_zeros(1)).to(torch.uint8)
