"""The tables of step times, in small."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.kernels import compaction_makers, rebuilding_makers, sampling_makers
from benchmarks.speed import BLOCK, GOALS, Comparison, Timed, compare, table
from benchmarks.subjects import KEPT, Lab, Make, Size, Subject, makers, quantised_makers, recomputation_makers

TINY = Size("cpu", torch.float32, 64, 128, 2, 16, 32)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_method_has_a_ratio_to_the_frozen_step() -> None:
    timed = compare(Comparison(makers, TINY), rounds=1)
    rows = table(timed, "cpu")
    assert {row["name"] for row in rows} > {f"{each.name} / frozen" for each in timed[1:]}
    assert all(row["ratio"] > 0 for row in rows)
    shares = {each.name: each.share for each in timed if each.share is not None}
    assert shares["compaction, s = 0"] > shares["compaction, s = 1"] > shares["compaction, s = 2"] > shares["columns"]


def test_qspiel_is_measured_against_spiel_over_the_dense_base() -> None:
    (row,) = table(compare(Comparison(quantised_makers, TINY), rounds=1), "cpu")
    assert row["name"] == "qSpIEL, checkpointed / SpIEL over float32, checkpointed"
    assert row["dtype"] == "nf4, values float32 / float32, values float32"
    assert row["ratio"] > 0


@pytest.mark.parametrize("kernel_makers", [sampling_makers, rebuilding_makers])
def test_without_a_kernel_its_plain_form_has_no_row(kernel_makers: Callable[[Lab], dict[str, Make]]) -> None:
    timed = compare(Comparison(kernel_makers, TINY), rounds=1)
    assert [each.name.endswith(", plain") for each in timed] == [True]
    assert timed[0].seconds[0] > 0
    assert table(timed, "cpu") == []


def test_compaction_is_measured_against_the_dense_product() -> None:
    (row,) = table(compare(Comparison(compaction_makers, TINY), rounds=1), "cpu")
    assert row["name"] == "compaction of it / dense product"
    assert 0 < row["share"] < 1
    assert row["ratio"] > 0


def test_blocks_of_rounds_alternate_and_pair() -> None:
    timed = compare(Comparison(recomputation_makers, TINY, in_blocks=True), rounds=5)
    assert {len(each.seconds) for each in timed} == {8}
    assert f"{KEPT} / fused LoRA r = 1, checkpointed" in {row["name"] for row in table(timed, "cpu")}


def test_what_does_not_fit_together_is_measured_in_blocks() -> None:
    """A device with room for one model: a second one beside it is refused."""
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def crowded(lab: Lab) -> dict[str, Make]:
        def make(name: str) -> Subject:
            if alive:
                raise torch.OutOfMemoryError("no room for two")
            subject = lab.sparse(name)
            alive.add(subject.model)
            return subject

        return {name: partial(make, name) for name in ("one", "other")}

    assert [len(each.seconds) for each in compare(Comparison(crowded, TINY), rounds=1)] == [BLOCK, BLOCK]


def test_what_does_not_fit_has_a_row_that_says_so() -> None:
    name, to = next(pair for pair in GOALS["cuda"] if pair[0] == KEPT)
    (row,) = table([Timed(to, seconds=(1.0,)), Timed(name, failure="out of memory")], "cuda")
    assert (row["ratio"], row["goal"], row["failure"]) == (None, 0.75, "out of memory")


def test_every_goal_is_of_subjects_that_are_made() -> None:
    """At the full width, where LoRA has rank 64; nothing but names is made."""
    from benchmarks.subjects import CPU_SIZE, Lab

    size = Size("cpu", torch.bfloat16, 4096, 128, 1, 128, 8)
    for device, lab in (("cuda", Lab(size)), ("cpu", Lab(CPU_SIZE))):
        known = {name for make in (makers, quantised_makers, recomputation_makers) for name in make(lab)}
        assert {name for pair in GOALS[device] for name in pair} <= known
