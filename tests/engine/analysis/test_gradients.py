"""Shares and histograms against vectors counted by hand; the twin."""

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.analysis.figures import normal_share
from engine.analysis.gradients import GradientMeter, log_histogram, measure_gradients, norms_of_top
from engine.analysis.results import BINS_PER_DECADE, LOWEST_DECADE
from engine.analysis.twin import random_twin
from engine.data.batches import Batch
from engine.sparse.entries import ActiveEntries


def _batches(count: int) -> list[Batch]:
    rows = [torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(n)) for n in range(count)]
    return [Batch(ids, ids, torch.ones_like(ids), 22) for ids in rows]


def test_top_norms_of_a_known_vector() -> None:
    squares = torch.tensor([1.0, 16.0, 0.0, 4.0])
    assert norms_of_top(squares, [1, 2, 4]) == [16.0, 20.0, 21.0]


def test_histogram_counts_each_entry_in_its_quarter_decade_and_no_zero() -> None:
    counted = log_histogram(torch.tensor([0.0, 0.011, -0.012, 2.0, 1e-30, 1e9]))
    assert sum(counted) == 5
    assert counted[(-2 - LOWEST_DECADE) * BINS_PER_DECADE] == 2
    assert counted[-LOWEST_DECADE * BINS_PER_DECADE + 1] == 1  # log10(2) = 0.30
    assert counted[0] == counted[-1] == 1


def test_first_choice_is_followed_through_later_batches() -> None:
    entry = ActiveEntries("w", torch.nn.Parameter(torch.zeros(10, 20)), 2)
    meter = GradientMeter()
    first, later = torch.zeros(10, 20), torch.zeros(10, 20)
    first[0, 0], first[3, 4], first[5, 5] = 3.0, -4.0, 0.0
    later[0, 0], later[9, 9], later[8, 8] = 1.0, 2.0, -2.0
    for grad in (first, later):
        meter.observe(entry, grad)
        meter.end_batch()
    measure = meter.result().tensors["w"]
    assert measure.first == pytest.approx((1.0, 1 / 9))
    assert measure.own == pytest.approx((1.0, 8 / 9))
    assert (measure.zeros, measure.largest, sum(measure.histogram)) == (198, 4.0, 2)
    assert dict(measure.top)[1 / 200] == pytest.approx(16 / 25)


def test_weights_add_up_by_their_norms_and_one_not_reached_counts_as_zero() -> None:
    small, large = (ActiveEntries(name, torch.nn.Parameter(torch.zeros(2, 2)), 1) for name in ("a", "b"))
    meter = GradientMeter()
    meter.observe(small, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    meter.observe(large, torch.tensor([[3.0, 3.0], [3.0, 3.0]]))
    meter.end_batch()
    meter.observe(small, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    meter.end_batch()
    overall = meter.result().overall
    assert overall.own == pytest.approx((10 / 37, 1.0))
    assert overall.first == pytest.approx((10 / 37, 0.0))
    assert overall.numel == 8


def test_gradients_are_those_of_the_model_and_leave_none(tiny_llama: LlamaForCausalLM) -> None:
    batches = _batches(2)
    result = measure_gradients(tiny_llama, "attention", batches)
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = tiny_llama.get_parameter(name).requires_grad_(True)
    tiny_llama(input_ids=batches[0].input_ids, labels=batches[0].labels).loss.backward()
    assert weight.grad is not None
    squares = weight.grad.flatten().square()
    assert result.tensors[name].largest == pytest.approx(float(weight.grad.abs().max()))
    assert result.tensors[name].own[0] == pytest.approx(float(squares.topk(40).values.sum() / squares.sum()))
    assert len(result.tensors) == 8


def test_normal_share_is_that_of_normal_numbers() -> None:
    squares = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).square().sort(descending=True).values
    assert normal_share(0.01) == pytest.approx(float(squares[:10_000].sum() / squares.sum()), abs=2e-3)
    assert normal_share(1.0) == 1.0


def test_twin_is_seeded_differs_and_leaves_the_generator_alone(tiny_llama: LlamaForCausalLM) -> None:
    before = torch.get_rng_state()
    first, again, other = (random_twin(tiny_llama, seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.model.layers[0].mlp.up_proj.weight.detach() for model in (first, again, other, tiny_llama)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert float(weights[0].std()) == pytest.approx(tiny_llama.config.initializer_range, rel=0.1)
