"""The kernels of `kernels.py` and `product_layout.py` in Triton: imported only where there is a device for them.

None uses atomics or waits for another program, so that the same arguments give the same bits. Offsets are int64
wherever a weight or an activation of 2**31 numbers would not fit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.sparse.base_weight import NF4_BLOCK, NF4Packing
from engine.sparse.positions import TILE, Positions
from engine.sparse.product_layout import Layout

ENTRIES = 128  # that one program of `sample` takes
TOKENS = 256  # that it adds up; what programs of other tokens find is added afterwards
AT_ONCE = 16  # tokens
TILE_BLOCKS = TILE // NF4_BLOCK  # of a program of `rebuild`
CHANGES = 128  # entries that are added to a tile at once
TAKEN = 512  # entries that one program of `take` or `write` takes


@triton.jit(do_not_specialize=["count", "tokens"])  # which differ from batch to batch
def _sample(
    grad_y,  # (tokens, out_features)
    x,  # (tokens, in_features)
    positions,  # (count,)
    partial,  # (ceil(tokens / TOKENS), count) fp32
    count,
    tokens,
    width,  # in_features
    grad_token,  # strides
    grad_feature,
    x_token,
    x_feature,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    taken = place < count
    position = tl.load(positions + place, mask=taken, other=0).to(tl.int64)
    left = grad_y + (position // width * grad_feature)[None, :]
    right = x + (position % width * x_feature)[None, :]
    begin = tl.program_id(1).to(tl.int64) * TOKENS
    total = tl.zeros((AT_ONCE, ENTRIES), tl.float32)
    for first in range(0, TOKENS, AT_ONCE):
        token = (begin + first + tl.arange(0, AT_ONCE))[:, None]
        wanted = (token < tokens) & taken[None, :]
        factor = tl.load(left + token * grad_token, mask=wanted, other=0.0).to(tl.float32)
        total += factor * tl.load(right + token * x_token, mask=wanted, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(1).to(tl.int64) * count + place, tl.sum(total, 0), mask=taken)


def sample(grad_y: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """Return grad_y.T @ x at `positions`, (count,) fp32; see `kernels.sampled_products`.

    Tokens are the rows of both factors, so that an entry reads two columns: of each 32-byte sector, one number. The
    entries of a program are neighbours in the order of the weight, so that they lie in few rows and share the sectors
    of grad_y. Those of x, one an entry and token, come from the second level cache, which holds the tokens that
    programs at work share: from memory both factors come about once.

    Factors turned, so that tokens are contiguous, would take 4 bytes an entry and token instead of 32, but must be read
    and written first, 4 (in + out) bytes a token of bf16, and lie in memory twice, which no plan counts. By these bytes
    that pays from some (in + out) / 5 entries on; sampled products are for few. The kernel takes any strides.
    """
    count, tokens = positions.numel(), x.shape[0]
    partial = torch.empty(triton.cdiv(tokens, TOKENS), count, dtype=torch.float32, device=x.device)
    _sample[triton.cdiv(count, ENTRIES), partial.shape[0]](
        grad_y,
        x,
        positions,
        partial,
        count,
        tokens,
        x.shape[1],
        *grad_y.stride(),
        *x.stride(),
        ENTRIES=ENTRIES,
        TOKENS=TOKENS,
        AT_ONCE=AT_ONCE,
        enable_fp_fusion=True,
    )
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


@triton.jit(do_not_specialize=["count", "hot_step"])
def _take(
    products,
    indices,  # (count,)
    base,  # of `product_layout.Layout`
    shift,
    place,
    hot,
    found,  # (count,) fp32
    count,
    width,
    hot_step,
    HOT: tl.constexpr,  # whether there are hot columns
    TAKEN: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TAKEN + tl.arange(0, TAKEN)
    taken = at < count
    index = tl.load(indices + at, mask=taken, other=0).to(tl.int64)
    row = index // width
    within = tl.load(shift + row, mask=taken, other=0).to(tl.int64) + index
    where = tl.load(place + within, mask=taken, other=0).to(tl.int64) + tl.load(base + row, mask=taken, other=0)
    if HOT:
        column = tl.load(hot + (index - row * width), mask=taken, other=0).to(tl.int64)
        where = tl.where(column < 0, where, row * hot_step + column)
    tl.store(found + at, tl.load(products + where, mask=taken, other=0.0).to(tl.float32), mask=taken)


def take(products: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """Return the entries at `indices`, (count,) fp32, of products; see `product_layout.take_entries`.

    One launch for some ten small operations over the entries.
    """
    found = torch.empty(indices.numel(), dtype=torch.float32, device=products.device)
    hot = layout.base if layout.hot is None else layout.hot
    if indices.numel():
        _take[(triton.cdiv(indices.numel(), TAKEN),)](
            products,
            indices,
            layout.base,
            layout.shift,
            layout.place,
            hot,
            found,
            indices.numel(),
            layout.in_features,
            layout.hot_step,
            HOT=layout.hot is not None,
            TAKEN=TAKEN,
            enable_fp_fusion=True,
        )
    return found


@triton.jit(do_not_specialize=["count"])
def _write(flat, positions, base, values, count, TAKEN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TAKEN + tl.arange(0, TAKEN)
    taken = at < count
    changed = tl.load(base + at, mask=taken, other=0.0).to(tl.float32) + tl.load(values + at, mask=taken, other=0.0)
    place = tl.load(positions + at, mask=taken, other=0).to(tl.int64)
    tl.store(flat + place, changed.to(flat.dtype.element_ty), mask=taken)


def write(flat: Tensor, positions: Tensor, base: Tensor, values: Tensor) -> None:
    """Write round(base + values) at distinct positions; see `kernels.write_changed`."""
    if positions.numel():
        grid = (triton.cdiv(positions.numel(), TAKEN),)
        _write[grid](flat, positions, base, values, positions.numel(), TAKEN=TAKEN, enable_fp_fusion=True)


@triton.jit
def _change(out, positions, values, starts, tile, CHANGES: tl.constexpr):
    end = tl.load(starts + tile + 1)
    for first in range(tl.load(starts + tile), end, CHANGES):
        place = first + tl.arange(0, CHANGES)
        taken = place < end
        at = out + tl.load(positions + place, mask=taken, other=0).to(tl.int64)
        changed = tl.load(at, mask=taken, other=0.0).to(tl.float32) + tl.load(values + place, mask=taken, other=0.0)
        tl.store(at, changed.to(out.dtype.element_ty), mask=taken)


@triton.jit
def _rebuild(
    packed,  # (ceil(numel / 2),) uint8
    code,  # (16,) fp32
    absmax,  # (blocks,) uint8
    scales,  # (ceil(blocks / 256),) fp32
    scale_code,  # (256,) fp32
    offset,  # () fp32
    out,  # (numel,)
    positions,  # (n,), sorted; of tile i are those from starts[i] to starts[i + 1]
    values,
    starts,
    more_positions,
    more_values,
    more_starts,
    numel,
    num_bytes,  # of packed: an argument, so that whole vectors are read where they fit
    MORE: tl.constexpr,  # whether there are more
    BLOCKS: tl.constexpr,
    CHANGES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    here = block * 64 < numel
    scale = tl.load(scale_code + tl.load(absmax + block, mask=here, other=0).to(tl.int32))
    scale = scale * tl.load(scales + block // 256, mask=here, other=0.0) + tl.load(offset)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    units = tl.join(tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))).reshape(BLOCKS, 64)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, (units * scale[:, None]).to(out.dtype.element_ty), mask=at < numel)
    tl.debug_barrier()  # what other threads of this program stored is read and written again below
    _change(out, positions, values, starts, tile, CHANGES)
    if MORE:
        _change(out, more_positions, more_values, more_starts, tile, CHANGES)


def rebuild(weight: NF4Packing, changes: Sequence[tuple[Positions, Tensor]], out: Tensor) -> None:
    """Write into `out` the dequantised weight with `changes` added; see `kernels.rebuild_nf4`.

    A program owns a tile of the flat weight: it stores the dequantised numbers, rounded, and after a barrier adds the
    values of the entries in its tile to what it stored, which is still in the cache. As positions are sorted, a tile's
    are a range of them; as they are distinct, no two threads write the same number. Products are not fused with sums:
    each is rounded, as in the plain form.

    Args:
        weight: its parts.
        changes: one or two pairs of positions, all distinct, and values (n,) fp32.
        out: of the weight's shape and dtype, contiguous.
    """
    ranges = [(positions.flat(), values, positions.tiles) for positions, values in changes]
    _rebuild[(triton.cdiv(out.numel(), TILE),)](
        weight.packed,
        weight.code,
        weight.absmax,
        weight.scales,
        weight.scale_code,
        weight.offset,
        out,
        *ranges[0],
        *ranges[-1],
        out.numel(),
        weight.packed.numel(),
        MORE=len(ranges) > 1,
        BLOCKS=TILE_BLOCKS,
        CHANGES=CHANGES,
        enable_fp_fusion=False,
        num_stages=1,
    )
