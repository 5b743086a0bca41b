"""fp32 masters kept as their low halves: against plain fp32 values, bit for bit where that is claimed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.sparse.entries import ActiveEntries
from engine.sparse.masters import join, split
from engine.sparse.optim import SparseAdamW
from engine.sparse.states import StateStore

COUNT = 200_000
_FEW = 20_000
_ROW = 2000


def _numbers(low: int, high: int, generator: torch.Generator) -> Tensor:
    """Return (COUNT,) fp32 numbers of all sizes from 2^low to 2^high."""
    exponents = torch.randint(low, high, (COUNT,), generator=generator)
    return torch.randn(COUNT, generator=generator) * torch.exp2(exponents.float())


def _ties(numbers: Tensor) -> Tensor:
    """Return fp32 numbers that lie halfway between two bf16 numbers, or one unit beside."""
    beside = torch.arange(COUNT) % 3 - 1
    return (numbers.bfloat16().float().view(torch.int32) + 2**15 + beside.int()).view(torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_a_split_master_is_joined_again_and_its_high_half_is_the_rounded_one(seed: int) -> None:
    masters = _numbers(-30, 20, torch.Generator().manual_seed(seed))
    for numbers in (masters, _ties(masters), torch.cat((masters[:5] * 0, -masters[:5] * 0))):
        high, low = split(numbers)
        assert torch.equal(high.view(torch.int16), numbers.bfloat16().view(torch.int16))
        units = join(high, low).view(torch.int32) - numbers.view(torch.int32)
        down_to_even = numbers.view(torch.int32) - high.float().view(torch.int32) == 2**15
        assert torch.equal(units, -down_to_even.int())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [lambda base, change: change, lambda base, change: _ties(change) - base.float()])
def test_what_is_read_writes_the_same_weight_and_is_read_again(
    seed: int, make: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Values from far below the base to far above it, of both signs, ties among their sums."""
    generator = torch.Generator().manual_seed(seed)
    base = _numbers(-30, 3, generator).bfloat16()
    entry = _entry(base, compact=True)
    entry.update_values(lambda values: values.copy_(make(base, _numbers(-30, 3, generator))))
    entry.write_back()
    weight, values = entry.weight.detach().clone(), entry.read_values()
    assert torch.equal(weight.flatten(), (base.float() + values).bfloat16())
    entry.update_values(lambda again: None)
    assert torch.equal(entry.weight, weight)
    assert torch.equal(entry.read_values(), values)
    entry.restore()
    assert torch.equal(entry.weight.flatten().view(torch.int16), base.view(torch.int16))
    assert torch.equal(entry.read_values(), values)


def _entry(base: Tensor, *, compact: bool) -> ActiveEntries:
    entry = ActiveEntries("w", nn.Parameter(base.clone().view(_ROW, -1)), len(base), compact=compact)
    entry.place(torch.arange(len(base), dtype=torch.int32))
    entry.write_back()
    return entry


@pytest.mark.parametrize("rate", [1e-5, 1e-4])
def test_300_updates_give_the_weights_of_fp32_values(rate: float) -> None:
    """Moments in 8 bit both times."""
    base = (torch.randn(_FEW, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    plain, halves = _entry(base, compact=False), _entry(base, compact=True)
    store = StateStore(eight_bit=True)
    optimizers = [
        SparseAdamW([entry.values], rate, eps=1e-8, store=store, aged=False, split=[entry] if entry.split else [])
        for entry in (plain, halves)
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        grad = torch.randn(_FEW, generator=generator) * 1e-3 + 2e-4
        for entry, optimizer in zip((plain, halves), optimizers, strict=True):
            entry.values.grad = grad.clone()
            optimizer.step()
            entry.write_back()
    assert (plain.weight == halves.weight).float().mean() > 0.9995
    torch.testing.assert_close(halves.weight, plain.weight, atol=0, rtol=2**-7)  # by one unit
    torch.testing.assert_close(halves.read_values(), plain.read_values(), atol=1.3e-7, rtol=0)


@pytest.mark.parametrize("aged", [False, True])
def test_entries_of_a_large_weight_take_12_bytes_each_and_ages_2(aged: bool) -> None:
    """Row starts and the scales of moments come on top: 0.1 bytes of each at 1 percent of rows of 4,096."""
    weight = nn.Parameter(torch.zeros(4096, 4096, dtype=torch.bfloat16), requires_grad=False)
    entry = ActiveEntries("w", weight, weight.numel() // 100, compact=True)
    entry.place(100 * torch.arange(entry.num_active, dtype=torch.int32))
    optimizer = SparseAdamW([entry.values], 1e-3, store=StateStore(eight_bit=True), aged=aged, split=[entry])
    entry.add_gradient(torch.randn(entry.num_active))
    optimizer.step()
    entry.write_back()
    tensors = [tensor for _, tensor in entry.resident()] + [entry.values, entry.values.grad]
    tensors += optimizer.state[entry.values].values()
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert 12 <= held / entry.num_active - 2 * aged <= 12.2
