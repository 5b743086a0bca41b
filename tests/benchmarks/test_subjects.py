"""The peers of the benchmarks and what they hold, in small."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import engine.chunked_loss
from benchmarks.fused_lora import FusedLora
from benchmarks.memory import FLOOR_GOAL, floor_bytes, floor_row, peak_bytes
from benchmarks.subjects import LLAMA_7B, Lab, Size, makers
from engine.units import GIB

TINY = Size("cpu", torch.float32, 64, 128, 2, 16, 32)


def test_fused_lora_is_lora() -> None:
    inner, x = nn.Linear(6, 5, bias=False).double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    lora = FusedLora(inner.requires_grad_(False), rank=2, scale=1.5)
    nn.init.normal_(lora.up)
    expected = x @ (inner.weight + 1.5 * lora.up @ lora.down).T
    torch.testing.assert_close(lora(x), expected)
    weights = torch.randn_like(expected)
    parts = (x, lora.down, lora.up)
    for own, plain in zip(
        torch.autograd.grad((lora(x) * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(own, plain)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["columns", "hook", "fused LoRA r = 1", "peft SHiRA"])
def test_peaks_hold_the_weights_and_repeat_exactly(name: str) -> None:
    lab = Lab(TINY)
    peaks = {peak_bytes(makers(lab)[name], "cpu") for _ in range(2)}
    assert len(peaks) == 1
    assert peaks.pop() > lab.weights_bytes


def test_the_floor_of_llama_7b_is_what_its_parts_add_up_to() -> None:
    """12.55 GiB of weights, 64.8 M entries, 32 layers that keep 93 KB a token; the logits of 512 tokens."""
    lab = Lab(replace(LLAMA_7B, device="cpu"))
    parts = (lab.weights_bytes, 10 * 64_760_053, 32 * 2048 * 93_184, 4 * 32_000 * 512)
    assert floor_bytes(lab) == pytest.approx(sum(parts), rel=1e-6)
    assert lab.weights_bytes == pytest.approx(12.55 * GIB, rel=1e-3)


def test_the_leanest_tuning_is_measured_over_the_floor() -> None:
    row = floor_row(Lab(TINY))
    assert row["name"] == "measured peak / computed floor"
    assert row["goal"] == FLOOR_GOAL
    assert row["ratio"] > 1


def test_the_loss_in_chunks_is_the_one_that_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of `summed_loss`, which has Liger-Kernel's where it is; here the plain form serves."""
    taken, plain = [], engine.chunked_loss.plain_loss
    monkeypatch.setattr(engine.chunked_loss, "plain_loss", lambda *a: (taken.append(a), plain(*a))[1])
    Lab(TINY).sparse("lean", chunked_loss=True).step()
    assert len(taken) == 1
