"""AdamW's states in 8 bit and in host memory: against torch's AdamW, and against the definition of the codes."""

import pytest
import torch
from torch import Tensor, nn

from engine.sparse.blockwise import BLOCK, FEWEST, code_book, dequantize, quantize
from engine.sparse.optim import EntrySeeds, SparseAdamW
from engine.sparse.states import StateStore

CPU = torch.device("cpu")
EIGHT_BIT = StateStore(eight_bit=True)


def _gradients(count: int, steps: int, spread: float = 0.5) -> list[Tensor]:
    """Return gradients whose entries have sizes and directions of their own, as those of a model have."""
    generator = torch.Generator().manual_seed(3)
    size = 1e-3 * torch.exp(spread * torch.randn(count, generator=generator))
    mean = torch.randn(count, generator=generator)
    return [size * (mean + torch.randn(count, generator=generator)) for _ in range(steps)]


def _train(values: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> Tensor:
    for grad in gradients:
        values.grad = grad.to(values).clone()
        optimizer.step()
    return values.detach()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_codes_are_the_nearest_ones(signed: bool, count: int) -> None:
    numbers = torch.randn(count) ** 3 if signed else torch.randn(count) ** 6
    codes, scales = quantize(numbers, signed=signed)
    book = code_book(signed, CPU)
    blocks = numbers.split(BLOCK)
    assert torch.equal(scales, torch.stack([block.abs().max() for block in blocks]))
    scaled = torch.cat([block / scale for block, scale in zip(blocks, scales, strict=True)])
    allowed = book if signed else book[1:]
    nearest = (scaled[:, None] - allowed).abs().min(1).values
    assert torch.equal((scaled - book[codes.long()]).abs(), nearest)


@pytest.mark.parametrize("signed", [True, False])
def test_dequantised_numbers_are_code_times_scale(signed: bool) -> None:
    codes, scales = quantize(torch.rand(3, 200) ** 4, signed=signed)
    numbers = dequantize(codes, scales, signed=signed)
    scale = scales.repeat_interleave(BLOCK)[:600].view(3, 200)
    assert torch.equal(numbers, code_book(signed, CPU)[codes.long()] * scale)


def test_blocks_of_zeros_stay_zero() -> None:
    for signed in (True, False):
        assert not dequantize(*quantize(torch.zeros(600), signed=signed), signed=signed).any()


@pytest.mark.parametrize("aged", [False, True])
def test_8_bit_states_stay_within_4_percent_of_fp32_over_100_steps(aged: bool) -> None:
    exact, coarse = (nn.Parameter(torch.zeros(8192)) for _ in range(2))
    gradients = _gradients(8192, 100)
    expected = _train(exact, torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0), gradients)
    found = _train(coarse, SparseAdamW([coarse], 1e-3, eps=1e-8, store=EIGHT_BIT, aged=aged), gradients)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.04


def test_entries_of_rare_and_small_gradients_make_no_wild_steps_in_8_bit() -> None:
    """A second moment rounded to zero beside a first one that is not would move an entry by hundreds of steps."""
    gradients = [grad * (torch.rand(8192) < 0.3) for grad in _gradients(8192, 100, spread=1.5)]
    values = nn.Parameter(torch.zeros(8192))
    found = _train(values, SparseAdamW([values], 1e-3, eps=1e-8, store=EIGHT_BIT, aged=False), gradients)
    assert float(found.abs().max()) < 100 * 1e-3


@pytest.mark.parametrize("shape", [(FEWEST - 1,), (70, 80)])
def test_offloaded_states_give_the_bits_of_torchs_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    gradients = [grad.view(shape) for grad in _gradients(ours.numel(), 100)]
    optimizer = SparseAdamW([ours], 1e-3, eps=1e-8, weight_decay=0.1, store=StateStore(offload=True), aged=False)
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1, fused=True)
    assert torch.equal(_train(ours, optimizer, gradients), _train(theirs, reference, gradients))
    assert sum(state.numel() for state in optimizer.state[ours].values()) == 2 * ours.numel() + 1


def test_small_tensors_keep_fp32_states() -> None:
    values = nn.Parameter(torch.zeros(FEWEST - 1))
    optimizer = SparseAdamW([values], 1e-3, store=EIGHT_BIT)
    _train(values, optimizer, _gradients(FEWEST - 1, 1))
    assert optimizer.state[values]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(("before", "after"), [(5000, 6000), (6000, 3000), (3000, 5000)])
@pytest.mark.parametrize("store", [StateStore(), EIGHT_BIT, StateStore(eight_bit=True, offload=True)])
def test_states_follow_entries_where_their_number_changes(before: int, after: int, store: StateStore) -> None:
    values = nn.Parameter(torch.zeros(before))
    optimizer = SparseAdamW([values], 1e-3, store=store)
    _train(values, optimizer, _gradients(before, 4))
    old = optimizer.moments(values)
    source = torch.randperm(before)[:after]
    source = torch.cat((source, torch.full((after - len(source),), -1)))
    source[7] = -1
    new = (source < 0).nonzero().flatten()
    values.data = torch.zeros(after)
    seeds = EntrySeeds(new, torch.full((len(new),), 1e-4), torch.full((len(new),), 1e-8), age=2)
    optimizer.remap(values, source, seeds)
    found = optimizer.moments(values)
    kept = source >= 0
    assert (found.age.tolist()[7], set(found.age[kept].tolist())) == (2, {4})
    tolerance = 0.04 * float(old.exp_avg.abs().max())
    torch.testing.assert_close(found.exp_avg[kept], old.exp_avg[source[kept]], atol=tolerance, rtol=0)
    torch.testing.assert_close(found.exp_avg[~kept], seeds.exp_avg, atol=tolerance, rtol=0)
    _train(values, optimizer, _gradients(after, 1))
    assert optimizer.moments(values).age[7] == 3


def test_ages_in_8_bit_end_where_no_correction_is_left() -> None:
    values = nn.Parameter(torch.zeros(FEWEST))
    optimizer = SparseAdamW([values], 1e-3, store=EIGHT_BIT)
    _train(values, optimizer, _gradients(FEWEST, 1))
    optimizer.state[values]["age"].fill_(32_767)
    _train(values, optimizer, _gradients(FEWEST, 1))
    assert set(optimizer.state[values]["age"].tolist()) == {32_767}
    assert 1 - torch.tensor(0.999) ** 32_767 == 1


@pytest.mark.gpu
@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_states_in_host_memory_give_the_same_bits_on_a_gpu(eight_bit: bool, aged: bool) -> None:
    results = []
    for offload in (False, True):
        values = [nn.Parameter(torch.zeros(count, device="cuda")) for count in (5000, 100, 70_000, 4096)]
        optimizer = SparseAdamW(values, 1e-3, store=StateStore(eight_bit, offload), aged=aged)
        for steps in zip(*(_gradients(each.numel(), 20) for each in values), strict=True):
            for each, grad in zip(values, steps, strict=True):
                each.grad = grad.cuda()
            optimizer.step()
        results.append([each.detach().cpu() for each in values])
        kept = {name: state for each in values for name, state in optimizer.state[each].items() if state.dim()}
        assert all(state.is_pinned() == offload and state.is_cuda != offload for state in kept.values())
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.gpu
def test_of_states_in_host_memory_a_gpu_holds_those_of_three_tensors() -> None:
    """However far the host is ahead: in 20 updates of 30 tensors it never waits."""
    values = [nn.Parameter(torch.zeros(2**22, device="cuda")) for _ in range(30)]
    optimizer = SparseAdamW(values, 1e-3, store=StateStore(offload=True), aged=False)
    for each in values:
        each.grad = torch.full_like(each, 1e-3)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_reserved() - before < 4 * 2 * values[0].nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_a_gpu_are_those_of_the_cpu(signed: bool) -> None:
    numbers = torch.randn(100_000) if signed else torch.randn(100_000) ** 2
    here, there = quantize(numbers, signed=signed), quantize(numbers.cuda(), signed=signed)
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(dequantize(*here, signed=signed), dequantize(*there, signed=signed).cpu())
