"""The kernels against their plain forms: in Triton's interpreter, compiled for cards, and where they fail."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from engine.sparse.base_weight import quantise_nf4
from engine.sparse.entries import ActiveEntries
from engine.sparse.gradient_costs import machine_key
from engine.sparse.kernels import (
    plain_rebuild,
    products_agree,
    rebuild_nf4,
    rebuilt_agree,
    samples_by_kernel,
    written_agree,
)
from engine.sparse.linear import rebuild_weight
from engine.sparse.positions import FlatPositions
from engine.sparse.product_layout import taken_agree
from engine.sparse.trial import Trial

PROJECT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def _run(script: str, cache: Path, **environment: str) -> str:
    """Run a script beside this file, and return what it said: whether Triton compiles is settled at its import."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path]),
        "TRITON_CACHE_DIR": str(cache),
        **environment,
    }
    program = [sys.executable, str(Path(__file__).parent / script)]
    done = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_in_the_interpreter_kernels_give_the_numbers_of_the_plain_forms(tmp_path: Path) -> None:
    _run("kernels_interpreted.py", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_cards_from_ampere_to_blackwell(tmp_path: Path) -> None:
    assert len(_run("kernels_compiled.py", tmp_path).splitlines()) == 4 * 3 * 5


@needs_triton
def test_a_kernel_that_does_not_run_is_given_up_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Triton finds no driver for the CPU: a real failure."""
    trial = Trial("Numbers are made", products_agree)
    with caplog.at_level(logging.WARNING):
        assert [trial.passes(CPU, dtype) for dtype in (torch.bfloat16, torch.float32)] == [False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Numbers are made without its kernel: ")
    assert "\n" not in said


@needs_triton
def test_a_kernel_with_other_numbers_is_given_up_for_good(caplog: pytest.LogCaptureFixture) -> None:
    trial = Trial("Numbers are made", lambda _, dtype: dtype != torch.float16)
    with caplog.at_level(logging.WARNING):
        found = [trial.run(lambda: 1, CPU, dtype) for dtype in (torch.bfloat16, torch.float16, torch.bfloat16)]
    assert found == [1, None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "Numbers are made without its kernel: ArithmeticError: other numbers in torch.float16 on cpu"
    ]


@needs_triton
def test_a_kernel_is_tried_once_and_full_memory_is_no_failure_of_it() -> None:
    tried = []

    def full() -> int:
        raise torch.OutOfMemoryError("full")

    trial = Trial("Numbers are made", lambda device, dtype: not tried.append((device, dtype)))
    with pytest.raises(torch.OutOfMemoryError):
        trial.run(full, CPU, torch.float32)
    assert trial.run(lambda: 1, CPU, torch.float32) == 1
    assert tried == [(CPU, torch.float32)]


def test_without_triton_there_is_the_plain_form_and_not_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert not Trial("Numbers are made", products_agree).passes(CPU, torch.float32)
    assert not caplog.records


def test_entries_come_to_the_kernel_sorted_and_distinct() -> None:
    weight = quantise_nf4(torch.randn(40, 32))
    entry = ActiveEntries("w", weight, 100)
    entry.place(torch.randperm(1280)[:100].sort().values.int(), torch.randn(100))
    for _ in range(3):
        entry.move(torch.randperm(1280)[:100].sort().values)
    assert entry.settled is not None
    both = (entry.placed, entry.settled.indices)
    assert all(bool((positions.diff() > 0).all()) for positions in both)
    assert torch.cat(both).unique().numel() == sum(positions.numel() for positions in both)
    entry.write_back()
    flat = weight.dense().flatten()
    for positions, values in ((entry.placed, entry.read_values()), (entry.settled.indices, entry.settled.values)):
        flat[positions.long()] += values
    assert torch.equal(rebuild_weight(entry, torch.float32), flat.view(40, 32))


def test_the_parts_of_a_packed_weight_are_those_that_the_plain_form_multiplies() -> None:
    weight = quantise_nf4(torch.randn(190, 90))
    parts = weight.packing
    assert parts is not None
    codes = torch.stack((parts.packed >> 4, parts.packed & 15), 1).flatten().long()
    absmax = parts.scale_code[parts.absmax.long()] * parts.scales.repeat_interleave(256)[: parts.absmax.numel()]
    entries = parts.code[codes] * (absmax + parts.offset).repeat_interleave(64)[: codes.numel()]
    assert torch.equal(entries.view(190, 90), weight.dense())


def test_a_weight_in_another_packing_has_no_parts() -> None:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    from engine.sparse.base_weight import NF4Weight

    packed, state = quantize_4bit(torch.randn(8, 64), compress_statistics=False, quant_type="nf4")
    assert NF4Weight(Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)).packing is None


def test_costs_on_a_cpu_know_no_kernel() -> None:
    assert not samples_by_kernel(CPU, torch.float32)
    assert "kernel" not in machine_key(CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_kernels_give_the_numbers_of_the_plain_forms(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    assert products_agree(device, dtype)
    assert taken_agree(device, dtype)
    assert written_agree(device, dtype)
    assert rebuilt_agree(device, dtype)
    assert "kernel" in machine_key(device, dtype)
    weight = quantise_nf4(torch.randn(1000, 777, device=device, dtype=dtype))
    indices = torch.arange(0, weight.numel(), 3, dtype=torch.int32, device=device)
    changes = [(FlatPositions(weight.numel(), indices), torch.randn(indices.numel(), device=device))]
    assert torch.equal(rebuild_nf4(weight, changes, dtype), plain_rebuild(weight, changes, dtype))
