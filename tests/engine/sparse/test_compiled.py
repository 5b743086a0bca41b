"""The update as one function, compiled and not, against the update step by step."""

import logging
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from engine.sparse.blockwise import FEWEST
from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import SparseAdamW
from engine.sparse.states import StateStore

COUNT = 5000  # not a multiple of the blocks
KINDS = [(compact, aged) for compact in (True, False) for aged in (True, False)]
STORE = StateStore(eight_bit=True)


def _train(compact: bool, aged: bool, *, fused: bool, device: str = "cpu", count: int = COUNT) -> ActiveEntries:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(100, 200, generator=generator)).to(device, torch.bfloat16))
    entry = ActiveEntries("w", weight.requires_grad_(False), count, compact=compact)
    entry.place(torch.randperm(20_000, generator=generator)[:count].sort().values.int())
    split = [entry] if compact else []
    optimizer = SparseAdamW([entry.values], 1e-3, weight_decay=0.1, store=STORE, aged=aged, split=split, compiled=fused)
    for _ in range(20):
        grad = 1e-3 * (torch.randn(count, generator=generator) + 0.5)
        entry.values.grad = grad.to(device)
        optimizer.step()
        entry.write_back()
    return entry


def _assert_alike(one: ActiveEntries, other: ActiveEntries) -> None:
    """All but a few entries, whose moments lie in the middle between two codes, to the rounding of fp32."""
    apart = (one.read_values() - other.read_values()).abs()
    assert (apart > 3e-8).float().mean() < 0.001
    assert apart.max() < 1e-4
    assert (one.weight == other.weight).float().mean() > 0.999


@pytest.mark.parametrize(("compact", "aged"), KINDS)
def test_one_function_updates_as_the_steps_do(compact: bool, aged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    _assert_alike(_train(compact, aged, fused=True), _train(compact, aged, fused=False))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_once_for_all_steps_and_sizes_it_updates_as_the_steps_do() -> None:
    """Compiling takes most of the time of this test, 10 to 30 seconds of one core."""
    graphs = counters["stats"]["unique_graphs"]
    for count in (COUNT, 2 * FEWEST):
        _assert_alike(_train(True, False, fused=True, count=count), _train(True, False, fused=False, count=count))
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.gpu
@pytest.mark.parametrize(("compact", "aged"), KINDS)
def test_compiled_on_a_gpu_it_updates_as_the_steps_do(compact: bool, aged: bool) -> None:
    fused, steps = (_train(compact, aged, fused=fused, device="cuda") for fused in (True, False))
    _assert_alike(fused, steps)


def test_without_a_compiler_the_function_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # dynamo's own way to a backend, which fails as one without a compiler does
    def none_here(*_: Any) -> Any:
        raise OSError("no compiler\nand a long tale")

    compiling = partial(torch.compile, backend=none_here)
    monkeypatch.setattr(torch, "compile", compiling)
    with caplog.at_level(logging.WARNING):
        fused = _train(True, False, fused=True)
    said = [record.getMessage() for record in caplog.records if record.name == "engine.sparse.compiling"]
    assert len(said) == 1
    assert said[0].startswith("The update of the trained entries is not compiled: ")
    assert "no compiler" in said[0]
    assert "tale" not in said[0]
    _assert_alike(fused, _train(True, False, fused=False))
