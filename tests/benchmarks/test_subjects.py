"""The peers and the tables of the benchmarks, in small."""

import pytest
import torch
from torch import nn

from benchmarks.fused_lora import FusedLora
from benchmarks.memory import peak_bytes
from benchmarks.speed import measure, table
from benchmarks.subjects import Lab, Size, makers

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


def test_masks_cluster_as_they_are_told_and_every_ratio_is_there() -> None:
    lab = Lab(TINY)
    wanted = ("frozen", "compaction, s = 0", "compaction, s = 2", "columns")
    made = [make() for name, make in makers(lab).items() if name in wanted]
    shares = [subject.share for subject in made]
    assert shares[0] is None
    assert shares[1] > shares[2] > shares[3]
    rows = table(made, measure(made, "cpu", rounds=1), "cpu")
    assert {row["name"] for row in rows} == {f"{name} / frozen" for name in wanted[1:]}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["columns", "hook", "fused LoRA r = 1", "peft SHiRA"])
def test_peaks_hold_the_weights_and_repeat_exactly(name: str) -> None:
    lab = Lab(TINY)
    peaks = {peak_bytes(makers(lab)[name], "cpu") for _ in range(2)}
    assert len(peaks) == 1
    assert peaks.pop() > lab.weights_bytes
