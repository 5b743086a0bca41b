from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.sparse.entries import ActiveEntries
from engine.sparse.selection import (
    EXACT_NUMEL,
    GlobalChoice,
    select_random_indices,
    select_topk_indices,
    squared_norms_of_top,
)
from engine.sparse.sift import add_in_host_memory


@pytest.mark.parametrize("shape", [(7,), (16, 8), (3, 5, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_topk_indices_are_sorted_unique_and_the_largest(shape: tuple[int, ...], seed: int) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    count = scores.numel() // 3
    indices = select_topk_indices(scores, count)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, indices.unique())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[indices.long()] = True
    magnitudes = scores.flatten().abs()
    assert len(indices) == count
    assert magnitudes[chosen].min() >= magnitudes[~chosen].max()


@pytest.mark.parametrize("shape", [(512, 256), (300, 257)])
@pytest.mark.parametrize("kind", ["spread", "clustered", "few values", "flat", "bfloat16"])
def test_topk_of_large_tensors_is_exact_whatever_their_sample_says(shape: tuple[int, int], kind: str) -> None:
    scores = torch.randn(shape)
    if kind == "clustered":
        scores[:, 3] *= 1e4
    elif kind == "few values":
        scores = scores.round()
    elif kind == "flat":
        scores = torch.ones(shape)
    elif kind == "bfloat16":
        scores = scores.bfloat16()
    for count in (1, 500, scores.numel() // 20, scores.numel() // 2):
        indices = select_topk_indices(scores, count)
        assert torch.equal(indices, indices.unique())
        sizes = scores.flatten().abs()
        assert torch.equal(sizes[indices.long()].sort().values, sizes.topk(count).values.sort().values)


@pytest.mark.parametrize("count", [4, 30, 200, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_global_choice_is_the_top_over_all_tensors_and_leaves_none_out(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: scale * torch.randn(numel, generator=generator)
        for name, numel, scale in (("a", 50, 1.0), ("b", 400, 0.01), ("c", 7, 3.0), ("d", 300, 1.0))
    }
    choice = GlobalChoice(count)
    for name, tensor in tensors.items():
        choice.add(name, tensor.abs(), tensor)
    found = choice.result()
    best = {name: tensor.abs().max() for name, tensor in tensors.items()}
    others = torch.cat([tensor.abs()[tensor.abs() < best[name]] for name, tensor in tensors.items()]).sort().values
    threshold = others[max(0, len(others) - (count - 4))] if count > 4 else float("inf")
    for name, tensor in tensors.items():
        positions, payload = found[name]
        expected = ((tensor.abs() >= threshold) | (tensor.abs() == best[name])).nonzero().flatten()
        assert torch.equal(positions.long(), expected)
        assert torch.equal(payload, tensor[expected])


class _TopK(TorchDispatchMode):
    """Keeps, of each `topk`, how many were asked for and whether in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default:
            in_order = (kwargs or {}).get("sorted", args[4] if len(args) > 4 else True)
            self.asked.append((args[1], in_order))
        return func(*args, **(kwargs or {}))


class _Makes(TorchDispatchMode):
    """Keeps the entries of the largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            self.largest = max(self.largest, each.numel())
        return out


def test_one_budget_is_cut_without_sorting_it_which_takes_a_gpu_several_times_its_memory() -> None:
    choice = GlobalChoice(600)
    with _TopK() as seen:
        for name in "abcdef":
            scores = torch.rand(500, generator=torch.Generator().manual_seed(ord(name)))
            choice.add(name, scores, scores)
        choice.result()
    assert len(seen.asked) > 1
    assert not any(in_order for _, in_order in seen.asked)


def test_topk_refuses_nan_and_counts_out_of_range() -> None:
    with pytest.raises(ValueError, match="NaN"):
        select_topk_indices(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match=r"\[1, 4\], got 5"):
        select_topk_indices(torch.ones(4), 5)


def test_random_indices_depend_on_the_generator_alone() -> None:
    first = select_random_indices(1000, 50, torch.Generator().manual_seed(1))
    again = select_random_indices(1000, 50, torch.Generator().manual_seed(1))
    other = select_random_indices(1000, 50, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert torch.equal(first, first.unique())
    assert not torch.equal(first, other)


def test_draws_of_a_large_weight_are_sorted_different_and_the_same_on_every_machine() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = select_random_indices(2**21, 50_000, generator)
    again = select_random_indices(2**21, 50_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert drawn.dtype == torch.int32
    assert len(drawn) == len(drawn.unique()) == 50_000
    assert torch.equal(drawn, drawn.sort().values)
    assert drawn[:4].tolist() == [40, 43, 127, 162]
    assert not torch.equal(drawn, select_random_indices(2**21, 50_000, generator))
    assert select_random_indices(2**40, 9, generator).dtype == torch.int64


def test_of_a_large_weight_every_set_is_drawn_as_often_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.targets.PERMUTED_NUMEL", 0)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(select_random_indices(16, 2, generator).tolist()) for _ in range(6000))
    expected = 6000 / 120  # pairs of 16
    chi_squared = sum((each - expected) ** 2 / expected for each in drawn.values())
    assert len(drawn) == 120
    assert chi_squared < 119 + 4 * (2 * 119) ** 0.5


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.125])
def test_a_draw_makes_nothing_as_large_as_the_weight(share: float) -> None:
    numel = 2**21
    with _Makes() as made:
        select_random_indices(numel, int(share * numel), torch.Generator().manual_seed(0))
    assert made.largest == int(share * numel)


def test_top_shares_are_exact_for_small_tensors() -> None:
    squares = torch.tensor([9.0, 16.0, 0.0, 1.0])
    assert squared_norms_of_top(squares, [1, 2, 3]) == [16.0, 25.0, 26.0]


def test_sampled_top_shares_are_within_two_percent_of_the_exact_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    squares = (torch.randn(20 * EXACT_NUMEL, generator=generator) ** 3).square()
    counts = [squares.numel() // 1000, squares.numel() // 100, squares.numel() // 20]
    exact = [float(squares.topk(count).values.sum()) for count in counts]
    assert squared_norms_of_top(squares, counts) == pytest.approx(exact, rel=0.02)


def test_gradients_in_16_bit_are_summed_in_fp32() -> None:
    entry = ActiveEntries("w", nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)), 9)
    grads, sums = torch.randn(3, 64, 64).bfloat16(), dict[str, Tensor]()
    for grad in grads:
        add_in_host_memory(sums, entry, grad)
    assert torch.equal(sums["w"], grads[0].float() + grads[1].float() + grads[2].float())


@pytest.mark.gpu
def test_sums_in_host_memory_take_nothing_of_a_gpu() -> None:
    """A gradient in 16 bit crosses as it is: converted on the device it would lie there in fp32 as well."""
    entry = ActiveEntries("w", nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16, device="cuda")), 9)
    grad, sums = torch.randn(1024, 1024, device="cuda").bfloat16(), dict[str, Tensor]()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        add_in_host_memory(sums, entry, grad)
    assert torch.cuda.max_memory_allocated() == before
