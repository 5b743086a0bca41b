"""Deltas as vectors: sums and multiples against arithmetic by hand, overlaps against sets."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.errors import DeltaError
from engine.sparse.attach import attach
from engine.sparse.compose import add, overlap, scale
from engine.sparse.delta import SparseDelta
from engine.spec import RunSpec


def _delta(model: LlamaForCausalLM, seed: int, density: float = 0.2, targets: str = "linear") -> SparseDelta:
    spec = RunSpec(model="tiny", method="random", density=density, seed=seed, targets=targets)
    tuning = attach(model, spec)
    with torch.no_grad():
        for entry in tuning.entries:
            entry.values.normal_(std=0.02)
    delta = tuning.delta()
    tuning.detach()
    return delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_applied_equals_values_added_by_hand(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = tiny_llama.to(dtype)
    deltas = [_delta(model, seed) for seed in (1, 2, 3)]
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in deltas[0].tensors:
        change = torch.zeros(expected[name].numel())
        for indices, values in (delta.tensors[name] for delta in deltas):
            change[indices.long()] += values
        expected[name] = (expected[name].float() + change.view_as(expected[name])).to(dtype)
    add(deltas).apply(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_sum_is_sorted_unique_and_keeps_dtypes_and_density(tiny_llama: LlamaForCausalLM) -> None:
    deltas = [_delta(tiny_llama, 1), _delta(tiny_llama, 2)]
    summed = add(deltas)
    target_numel = sum(tiny_llama.get_parameter(name).numel() for name in summed.tensors)
    for name, (indices, values) in summed.tensors.items():
        union = sorted({int(at) for delta in deltas for at in delta.tensors[name][0]})
        assert indices.tolist() == union
        assert (indices.dtype, values.dtype) == (torch.int32, torch.float32)
    assert summed.info.density == pytest.approx(summed.num_active / target_numel)


def test_delta_and_its_negative_leave_the_base_bit_for_bit(tiny_llama: LlamaForCausalLM) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    delta = _delta(tiny_llama, 1)
    applied = add([delta, scale(delta, -1)]).apply(tiny_llama)
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny_llama.state_dict().items())
    for entry in applied:
        entry.restore()
    bits = {name: tensor.view(torch.int32) for name, tensor in tiny_llama.state_dict().items()}
    assert all(torch.equal(tensor, base[name].view(torch.int32)) for name, tensor in bits.items())


def test_sum_of_one_is_itself_and_scaling_leaves_the_original(tiny_llama: LlamaForCausalLM) -> None:
    delta = _delta(tiny_llama, 1)
    half, same = scale(delta, 0.5), add([delta])
    assert same.info == delta.info
    for name, (indices, values) in delta.tensors.items():
        assert torch.equal(same.tensors[name][1], values)
        assert torch.equal(half.tensors[name][0], indices)
        assert torch.equal(half.tensors[name][1] * 2, values)


def test_methods_of_a_sum_are_named_once(tiny_llama: LlamaForCausalLM) -> None:
    delta = _delta(tiny_llama, 1)
    others = [replace(delta, info=replace(delta.info, method=method)) for method in ("sift", "random+spiel-ag")]
    assert add([delta, *others]).info.method == "random+sift+spiel-ag"


def test_overlap_counts_what_sets_count(tiny_llama: LlamaForCausalLM) -> None:
    first, second = _delta(tiny_llama, 1), _delta(tiny_llama, 2, density=0.4)
    overall, each = overlap(first, second)
    for name, found in each.items():
        left, right = (
            dict(zip(*(part.tolist() for part in delta.tensors[name]), strict=True)) for delta in (first, second)
        )
        shared = left.keys() & right.keys()
        assert found.jaccard == len(shared) / len(left.keys() | right.keys())
        assert found.same_sign == sum(left[at] * right[at] > 0 for at in shared) / len(shared)
        assert found.cosine == pytest.approx(
            torch.cosine_similarity(*(torch.tensor([v[at] for at in shared]).double() for v in (left, right)), dim=0)
        )
    assert overall.shared == sum(found.shared for found in each.values())


def test_overlap_with_itself_and_with_its_negative(tiny_llama: LlamaForCausalLM) -> None:
    delta = _delta(tiny_llama, 1)
    same, opposite = overlap(delta, delta)[0], overlap(delta, scale(delta, -2))[0]
    assert (same.jaccard, same.same_sign, same.cosine) == (1, 1, pytest.approx(1))
    assert (opposite.jaccard, opposite.same_sign, opposite.cosine) == (1, 0, pytest.approx(-1))


def test_nothing_shared_has_no_sign_and_no_cosine(tiny_llama: LlamaForCausalLM) -> None:
    delta = _delta(tiny_llama, 1)
    halves = [
        replace(delta, tensors={name: (at[half::2], values[half::2]) for name, (at, values) in delta.tensors.items()})
        for half in (0, 1)
    ]
    found = overlap(*halves)[0]
    assert (found.shared, found.jaccard, found.same_sign, found.cosine) == (0, 0, None, None)


def test_other_weights_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    delta, attention = _delta(tiny_llama, 1), _delta(tiny_llama, 1, targets="attention")
    quantised = replace(delta, info=replace(delta.info, quantization="nf4"))
    for compare in (lambda one, other: add([one, other]), overlap):
        with pytest.raises(DeltaError, match=f"fingerprint {attention.info.fingerprint[:12]}"):
            compare(delta, attention)
        with pytest.raises(DeltaError, match="quantization=none and quantization=nf4"):
            compare(delta, quantised)


def test_no_delta_and_no_number_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(DeltaError, match="one delta or more, got none"):
        add([])
    with pytest.raises(DeltaError, match="finite number, got nan"):
        scale(_delta(tiny_llama, 1), float("nan"))
    with pytest.raises(DeltaError, match=r"Times 1e\+300 the delta's values overflow fp32"):
        scale(_delta(tiny_llama, 1), 1e300)
