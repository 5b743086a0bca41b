"""The plane through random weights and the model: its ends are theirs, and nothing is left moved."""

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.analysis.landscape import Plane, measure_landscape, spaced
from engine.analysis.twin import random_twin
from engine.data.batches import Batch
from engine.evaluate import heldout_loss


def _batch() -> Batch:
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    return Batch(ids, ids, torch.ones_like(ids), 22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_the_two_models_and_the_weights_come_back(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = tiny_llama.to(dtype).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    twin, batch = random_twin(model, 5), _batch()
    result = measure_landscape(model, twin, [batch], line=6, grid=3, seed=0)
    line = dict(zip(result.alphas, result.line, strict=True))
    assert line[1.0] == heldout_loss(model, [batch], model.device)
    assert line[0.0] == pytest.approx(
        heldout_loss(twin, [batch], model.device), rel=1e-2 if dtype != torch.float32 else 1e-5
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [len(row) for row in result.plane] == [3, 3, 3]


def test_second_direction_is_the_first_times_one_draw_an_entry(tiny_llama: LlamaForCausalLM) -> None:
    twin = random_twin(tiny_llama, 5)
    weight = tiny_llama.model.layers[1].mlp.up_proj.weight
    one, random = weight.detach().clone(), twin.model.layers[1].mlp.up_proj.weight
    with Plane(tiny_llama, twin, seed=0) as plane:
        plane.place(0.0, 1.0)
        moved = (weight - random).detach()
        plane.place(0.0, -0.5)
        assert torch.allclose((weight - random).detach(), -0.5 * moved, atol=1e-5)
    d = moved / (one - random).detach()
    assert float(d.median()) == pytest.approx(0.0, abs=0.05)
    assert float((d.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.02)


def test_weights_come_back_where_a_loss_fails(tiny_llama: LlamaForCausalLM) -> None:
    before = tiny_llama.lm_head.weight.detach().clone()

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_landscape(tiny_llama, random_twin(tiny_llama, 0), [_batch()], line=2, grid=2, seed=0, progress=stop)
    assert torch.equal(tiny_llama.lm_head.weight, before)


def test_spacing_hits_its_round_numbers() -> None:
    assert spaced(-0.5, 1.5, 5) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert {0.0, 1.0} <= {*spaced(-0.5, 1.5, 41)}
