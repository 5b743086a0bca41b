"""The kernels against plain forms in Triton's interpreter, on the CPU; run by `test_kernels.py` in its own process.

The interpreter cuts the last bits of a number where it makes bf16 of it, and does not round: in bf16 the kernel is
compared with numbers cut in the same places. That a GPU rounds there is seen in the compiled code.
"""

import torch
from torch import Tensor

from engine.sparse.base_weight import NF4Packing, NF4Weight, quantise_nf4
from engine.sparse.entries import ActiveEntries
from engine.sparse.kernels import Change, plain_rebuild, products_agree, rebuilt_agree, written_agree
from engine.sparse.positions import TILE, FlatPositions
from engine.sparse.product_layout import Layout, taken_agree
from engine.sparse.triton_kernels import rebuild, sample, take, write

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")


def check_products(grad_y: Tensor, x: Tensor, positions: Tensor) -> None:
    """The kernel's products are the exact ones up to the rounding of fp32 sums."""
    found = sample(grad_y, x, positions)
    exact = (grad_y.double().T @ x.double()).flatten()[positions.long()]
    terms = (grad_y.double().abs().T @ x.double().abs()).flatten()[positions.long()]
    assert found.dtype == torch.float32
    assert found.shape == positions.shape
    assert bool(((found - exact).abs() <= 1e-6 * terms).all()), (grad_y.shape, x.shape, grad_y.dtype)


def products() -> None:
    """Lengths beside the sizes of blocks, positions in any order and twice, no position, strides."""
    for dtype in FLOATS:
        for tokens, out, width, count in ((1, 3, 5, 4), (256, 16, 16, 128), (257, 33, 129, 129), (600, 20, 7, 50)):
            grad_y, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, width).to(dtype)
            check_products(grad_y, x, torch.randint(out * width, (count,), dtype=torch.int32))
        assert sample(grad_y, x, torch.empty(0, dtype=torch.int32)).shape == (0,)
        wide, turned = torch.randn(90, 18).to(dtype), torch.randn(15, 45).to(dtype).T
        check_products(wide[::2, 3:], turned, torch.randperm(225))
        assert products_agree(CPU, dtype)


def products_far_apart() -> None:
    """Offsets of 2**31 numbers in both factors, and positions beyond 2**31."""
    far, width = 2**31 + 16, 2**20
    grad_y, x = (torch.empty(far + size, dtype=torch.float16).as_strided((2, size), (far, 1)) for size in (4096, width))
    rows, columns = torch.tensor([4095, 0, 2049]), torch.tensor([width - 1, 5, 77])
    expected = torch.zeros(3)
    for token in range(2):
        grad_y[token, rows], x[token, columns] = (torch.randn(2, 3) + 2).half()
        expected += grad_y[token, rows].float() * x[token, columns].float()
    torch.testing.assert_close(sample(grad_y, x, rows * width + columns), expected)


def taken() -> None:
    """Entries of products in every dtype, in any order and twice, in positions of either length, and none."""
    for dtype in FLOATS:
        assert taken_agree(CPU, dtype)
        nothing = torch.empty(0, dtype=torch.int32)
        assert take(torch.zeros(3, dtype=dtype), nothing, Layout(nothing, nothing, nothing, None, 0, 5)).shape == (0,)
    one = torch.tensor([0])
    layout = Layout(one, one, torch.arange(2), None, 0, 2)
    assert take(torch.tensor([2.0, 3.0]), torch.tensor([1, 0, 1]), layout).tolist() == [3, 2, 3]


def written() -> None:
    """Sums of base entries and values, cut where bf16 ends, at their places and nowhere else; none as well."""
    for dtype in FLOATS:
        assert dtype == torch.bfloat16 or written_agree(CPU, dtype)
        base, positions = torch.randn(2000).to(dtype), torch.randperm(2000)[:600]
        found, values = base.clone(), torch.randn(600)
        write(found, positions, base[positions], values)
        sums = base[positions].float() + values
        expected = base.index_copy(0, positions, (cut(sums) if dtype == torch.bfloat16 else sums).to(dtype))
        assert torch.equal(found, expected)
        write(found, positions[:0], base[:0], values[:0])
        assert torch.equal(found, expected)


def check_rebuilt(weight: NF4Weight, changes: list[Change], dtype: torch.dtype) -> None:
    """The kernel's weight is that of the plain form bit for bit, rounded as the interpreter does."""
    packing = weight.packing
    assert packing is not None
    found = torch.empty(weight.shape, dtype=dtype)
    rebuild(packing, changes, found)
    if dtype != torch.bfloat16:
        assert torch.equal(found, plain_rebuild(weight, changes, dtype)), (weight.shape, dtype)
        return
    expected = cut(scaled(packing)[: weight.numel()])
    for positions, values in changes:
        at = positions.flat().long()
        expected[at] = cut(expected[at] + values)
    assert torch.equal(found, expected.to(dtype).view(weight.shape)), weight.shape


def scaled(packing: NF4Packing) -> Tensor:
    """Return what `NF4Packing` says that the entries are, in fp32, up to the end of the last block."""
    codes = torch.stack((packing.packed >> 4, packing.packed & 15), 1).flatten().long()
    scales = packing.scales.repeat_interleave(256)[: packing.absmax.numel()]
    absmax = packing.scale_code[packing.absmax.long()] * scales + packing.offset
    return packing.code[codes] * absmax.repeat_interleave(64)[: codes.numel()]


def cut(numbers: Tensor) -> Tensor:
    """Return fp32 `numbers` without the bits that bf16 has no place for."""
    return (numbers.view(torch.int32) & ~0xFFFF).view(torch.float32)


def change(weight: NF4Weight, indices: Tensor) -> Change:
    """Return what is added at `indices`, beside weights of about 0.02."""
    return FlatPositions(weight.numel(), indices), 0.01 * torch.randn(indices.numel())


def rebuilt() -> None:
    """Weights that end within a block, a byte, a tile; entries at borders of tiles, all entries, tiles without any."""
    for dtype in FLOATS:
        for shape in ((1, 1), (3, 5), (64, 64), (190, 90), (5, 4099)):
            weight = quantise_nf4((0.02 * torch.randn(shape)).to(dtype))
            few = torch.arange(0, weight.numel(), 37, dtype=torch.int32)
            more = (few + 1)[few + 1 < weight.numel()].long()
            check_rebuilt(weight, [change(weight, few), change(weight, more)], dtype)
            check_rebuilt(weight, [change(weight, few[:0]), change(weight, few)], dtype)
        check_rebuilt(weight, [change(weight, torch.arange(TILE - 200, TILE + 200))], dtype)
        borders = torch.tensor([0, TILE - 1, TILE, 2 * TILE - 1, 3 * TILE, 4 * TILE - 1])  # none in the third tile
        check_rebuilt(weight, [change(weight, borders)], dtype)
        assert dtype == torch.bfloat16 or rebuilt_agree(CPU, dtype)


def rebuilt_after_moves() -> None:
    """The table of where a tile's entries begin is kept for the length of a placement, by rows and flat."""
    for compact in (False, True):
        weight = quantise_nf4(0.02 * torch.randn(190, 90))
        entry = ActiveEntries("w", weight, 1700, compact=compact)
        for move in (entry.place, entry.move, entry.move, entry.place):
            move(torch.randperm(weight.numel())[:1700].sort().values.int())
            settled = [] if entry.settled is None else [(entry.settled.positions, entry.settled.values)]
            changes = [(entry.positions, 0.01 * torch.randn(1700)), *settled]
            check_rebuilt(weight, changes, torch.float32)
            table = entry.positions.tiles
            check_rebuilt(weight, changes, torch.float32)
            assert entry.positions.tiles is table


def main() -> None:
    """Check all."""
    torch.manual_seed(0)
    products()
    products_far_apart()
    taken()
    written()
    rebuilt()
    rebuilt_after_moves()


if __name__ == "__main__":
    main()
