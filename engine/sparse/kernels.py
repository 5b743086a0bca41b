"""Kernels of this project's own for a GPU (`triton_kernels.py`), each beside the plain form that it stands for.

Sampled products: the gradient of a few entries of a linear layer. Rebuilding NF4: the dequantised weight with the
values added, in one pass and without what the plain form holds besides: a copy of the positions in int64, and the
entries gathered, summed and rounded. Writing: round(base + value) at the trained entries of a dense weight, in one pass
instead of four. Another one takes entries out of products (`product_layout.py`).

A kernel is compared with its plain form when it is first wanted on a device and in a dtype, on a small case. Where it
fails or gives other numbers the plain form is taken from then on, and the log says so once. Without Triton, on a CPU
and on the meta device there is the plain form only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.planner.formulas import SAMPLED_NUMEL
from engine.sparse.base_weight import NF4Packing, NF4Weight, quantise_nf4
from engine.sparse.positions import FlatPositions, Positions
from engine.sparse.trial import FLOATS, Trial

Change = tuple[Positions, Tensor]  # and values (n,)


def sampled_products(grad_y: Tensor, x: Tensor, positions: Tensor, at_once: int = SAMPLED_NUMEL) -> Tensor:
    """Return the entries of grad_y.T @ x at `positions`, (n,), in fp32 (fp64 of fp64).

    Args:
        grad_y: (tokens, out_features).
        x: (tokens, in_features), same dtype.
        positions: (n,) flat positions in any order; those of a kernel are better in order.
        at_once: numbers of each factor that the plain form gathers at a time, at least those of an entry.
    """
    if x.device.type == "cuda" and x.dtype in FLOATS:
        found = PRODUCTS.run(lambda: _kernel_products(grad_y, x, positions), x.device, x.dtype)
        if found is not None:
            return found
    return plain_products(grad_y, x, positions, at_once)


def samples_by_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether sampled products are a kernel's on `device` in `dtype`."""
    return device.type == "cuda" and dtype in FLOATS and PRODUCTS.passes(device, dtype)


def plain_products(grad_y: Tensor, x: Tensor, positions: Tensor, at_once: int = SAMPLED_NUMEL) -> Tensor:
    """See `sampled_products`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = []
    for part in positions.split(max(1, at_once // x.shape[0])):
        left = grad_y.index_select(1, part // x.shape[1]).to(dtype)
        right = x.index_select(1, part % x.shape[1])
        found.append((left * right).sum(0))
    return torch.cat(found)


def _kernel_products(grad_y: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    from engine.sparse.triton_kernels import TOKENS, sample

    parts = positions.split(max(1, SAMPLED_NUMEL // -(-x.shape[0] // TOKENS)))
    with torch.cuda.device_of(x):
        return torch.cat([sample(grad_y, x, part) for part in parts])


def rebuild_nf4(weight: NF4Weight, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """Return round(round(W) + values), (out_features, in_features), in `dtype`: a new tensor.

    Args:
        weight: W, dequantised to its own dtype.
        changes: what is added, at most two; no position is in both. None: W is returned.
        dtype: of the result; sums are in the dtype of the values.
    """
    known = weight.dtype == dtype and all(values.dtype == torch.float32 for _, values in changes)
    if changes and known and weight.device.type == "cuda" and dtype in FLOATS:
        packing = weight.packing
        if packing is not None:
            found = REBUILDING.run(lambda: _kernel_rebuild(packing, changes, weight), weight.device, dtype)
            if found is not None:
                return found
    return plain_rebuild(weight, changes, dtype)


def rebuilds_by_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether NF4 weights are rebuilt by a kernel on `device` in `dtype`."""
    return device.type == "cuda" and dtype in FLOATS and REBUILDING.passes(device, dtype)


def plain_rebuild(weight: NF4Weight, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """See `rebuild_nf4`."""
    dense = weight.dense().to(dtype)
    flat = dense.view(-1)
    for where, values in changes:
        positions = where.flat().long()
        flat.index_copy_(0, positions, (flat.index_select(0, positions).to(values.dtype) + values).to(dtype))
    return dense


def _kernel_rebuild(packing: NF4Packing, changes: Sequence[Change], weight: NF4Weight) -> Tensor:
    from engine.sparse.triton_kernels import rebuild

    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(dense):
        rebuild(packing, changes, dense)
    return dense


def write_changed(flat: Tensor, positions: Tensor, base: Tensor, values: Tensor) -> None:
    """Write round(base + values) at `positions` of `flat`, a weight flattened.

    Args:
        flat: (numel,).
        positions: (n,) distinct.
        base: (n,) in the dtype of the weight.
        values: (n,) fp32 (fp64 over fp64); sums are in their dtype.
    """
    known = flat.device.type == "cuda" and flat.dtype in FLOATS and values.dtype == torch.float32
    if known and WRITING.run(lambda: _kernel_write(flat, positions, base, values), flat.device, flat.dtype) is not None:
        return
    plain_write(flat, positions, base, values)


def plain_write(flat: Tensor, positions: Tensor, base: Tensor, values: Tensor) -> None:
    """See `write_changed`."""
    put(flat, positions, base + values)


def put(flat: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write `entries`, rounded to the dtype of `flat`, at `positions`."""
    flat.index_copy_(0, positions.long(), entries.to(flat.dtype))


def _kernel_write(flat: Tensor, positions: Tensor, base: Tensor, values: Tensor) -> Tensor:
    from engine.sparse.triton_kernels import write

    with torch.cuda.device_of(flat):
        write(flat, positions, base, values)
    return flat


def products_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel gives the products up to the order of their sums."""
    generator = torch.Generator().manual_seed(0)
    grad_y, x = (torch.randn(300, width, generator=generator).to(device, dtype) for width in (70, 90))
    positions = torch.randint(70 * 90, (200,), generator=generator, dtype=torch.int32).to(device)
    found, plain = (form(grad_y, x, positions) for form in (_kernel_products, plain_products))
    return torch.allclose(found, plain, rtol=1e-5, atol=1e-4)


def rebuilt_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel gives the bits of the plain form, for entries of both kinds."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((190, 90))
    weight = quantise_nf4((0.02 * torch.randn(shape, generator=generator)).to(device, dtype))
    changes = []
    for part in torch.randperm(shape.numel(), generator=generator)[:600].int().split(400):
        values = 0.01 * torch.randn(part.numel(), generator=generator)
        changes.append((FlatPositions(shape.numel(), part.sort().values.to(device)), values.to(device)))
    packing = weight.packing
    assert packing is not None, "packed here"
    return torch.equal(_kernel_rebuild(packing, changes, weight), plain_rebuild(weight, changes, dtype))


def written_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel writes the bits of the plain form, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, generator=generator).to(device, dtype)
    positions = torch.randperm(3000, generator=generator)[:700].sort().values.int().to(device)
    values = 0.01 * torch.randn(700, generator=generator).to(device)
    written = []
    for form in (_kernel_write, plain_write):
        written.append(weight.clone())
        form(written[-1], positions, weight[positions.long()], values)
    return torch.equal(*written)


PRODUCTS = Trial("Gradients of few entries are computed", products_agree)
REBUILDING = Trial("NF4 weights are rebuilt", rebuilt_agree)
WRITING = Trial("Changed entries are written", written_agree)
