import pytest
import torch

from engine.sparse.selection import (
    EXACT_NUMEL,
    select_random_indices,
    select_topk_indices,
    squared_norm,
    squared_norm_of_top,
)


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


def test_top_share_is_exact_for_small_tensors() -> None:
    grad = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert squared_norm(grad) == 26.0
    assert squared_norm_of_top(grad, 2) == 25.0


def test_sampled_top_share_is_within_two_percent_of_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2 * EXACT_NUMEL, generator=generator) ** 3
    count = grad.numel() // 100
    exact = float(grad.square().topk(count).values.sum())
    assert squared_norm_of_top(grad, count) == pytest.approx(exact, rel=0.02)
