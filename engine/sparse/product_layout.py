"""Where the trained entries of a weight are in the products that hold their gradients, and taking them out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sparse.trial import FLOATS, Trial


@dataclass(frozen=True)
class Layout:
    """Where in the products, one behind the other, entry (i, j) of the weight is.

    Column j is hot where hot[j] >= 0: the entry is at hot[j] + i `hot_step`. Else, with k the block of row i, at
    base[i] + place[k, j]; of a block without a product anywhere.
    """

    base: Tensor  # (out,)
    shift: Tensor  # (out,) what to add to a flat position in the weight to have the one of (k, j) in `place`
    place: Tensor  # (blocks * in,)
    hot: Tensor | None  # (in,)
    hot_step: int
    in_features: int


def take_entries(products: Tensor, indices: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the entries of a weight at `indices`, (n,) flat positions in any order, (n,) in `dtype`.

    What stands for an entry that no product holds has no meaning.

    Args:
        products: (numel,).
        indices: of the dtype of the layout.
        layout: where entries are.
        dtype: of what is returned.
    """
    if products.device.type == "cuda" and dtype == torch.float32 and products.dtype in FLOATS:
        found = TAKING.run(lambda: _kernel_take(products, indices, layout), products.device, products.dtype)
        if found is not None:
            return found
    return plain_take(products, indices, layout).to(dtype)


def plain_take(products: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """See `take_entries`; in the dtype of the products."""
    row = indices // layout.in_features
    at = layout.place.index_select(0, layout.shift.index_select(0, row).add_(indices))
    at.add_(layout.base.index_select(0, row))
    if layout.hot is not None:
        hot = layout.hot.index_select(0, indices - row * layout.in_features)
        at = torch.where(hot < 0, at, row.mul_(layout.hot_step).add_(hot))
    return products.index_select(0, at)


def _kernel_take(products: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    from engine.sparse.triton_kernels import take

    with torch.cuda.device_of(products):
        return take(products, indices, layout)


def taken_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel takes the entries that the plain form takes, with hot columns and without."""
    generator = torch.Generator().manual_seed(0)
    rows, width, blocks = 70, 90, 3

    def draw(most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=generator, dtype=torch.int32).to(device)

    shift = (draw(blocks, rows) - torch.arange(rows, dtype=torch.int32, device=device)) * width
    base, place, hot, indices = draw(70, rows), draw(4000, blocks * width), draw(9, width) - 5, draw(rows * width, 300)
    products = torch.randn(5000, generator=generator).to(device, dtype)
    layouts = (Layout(base, shift, place, hot, 5, width), Layout(base, shift, place, None, 0, width))
    return all(
        torch.equal(_kernel_take(products, indices, layout), plain_take(products, indices, layout).float())
        for layout in layouts
    )


TAKING = Trial("Gradients are taken out of products", taken_agree)
