"""What the weights of a model take and leave in a backward, worked out once for the many plans with the same ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engine.planner import formulas
from engine.planner.adapters import adapter_of
from engine.planner.blocks import Weights
from engine.planner.formulas import FP32_BYTES
from engine.planner.one_budget import OneBudget
from engine.planner.operations import LinearWeight
from engine.planner.tape import Weight
from engine.planner.workload import Workload

Taking = Literal["gathering", "choosing", "summing"]
"""What becomes of dense gradients: the entries' are gathered, or the entries are chosen by them or by their sums."""


class Basis:
    """What the weights of a pass depend on: not the budget or what is recomputed, nor the micro-batch, if not sampled.

    A search asks for hundreds of plans that differ in those alone. `work`: one workload of many.
    """

    def __init__(self, work: Workload, taking: Taking, first: bool) -> None:
        """Take a workload, what becomes of dense gradients, and whether the backward finds no gradients."""
        self.work, self.taking, self.first = work, taking, first
        spec = work.spec
        trained = (spec.method, spec.targets, spec.density, spec.num_trainable, spec.allocation, spec.lora_rank)
        kept = (work.setting.element_bytes, spec.quantization, spec.optimizer_states, spec.chunked_loss)
        sampled = work.setting.tokens if spec.gradient_way == "sampled" else None
        self._key = (work.shape, trained, kept, bool(spec.probe_interval), sampled, taking, first)

    def __hash__(self) -> int:
        """Hash what the weights depend on."""
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        """Return whether the weights are the same."""
        return isinstance(other, Basis) and self._key == other._key


@dataclass(frozen=True)
class Taken:
    """What the weights of a model take and leave.

    `outside`: of each target outside the blocks that is no adapter's. `blocks`: the weights of each block. `left`: what
    each block leaves, biases and others that no operation names included.
    """

    outside: Mapping[str, Weight]
    blocks: tuple[Weights, ...]
    left: tuple[int, ...]


@lru_cache(maxsize=16)
def taken_by(basis: Basis) -> Taken:
    """Return what the weights take; the same object for an equal basis."""
    work, first, alike = basis.work, basis.first, basis.work.targets.alike
    trains = () if work.adapted else work.numels
    weights: dict[int, Weights] = {}
    left: dict[int, int] = {}
    for layer in set(alike):
        block = work.shape.blocks[layer]
        trained = {name: _weight(work, name, basis.taking, first) for name in block.values() if name in trains}
        weights[layer] = tuple((inside, _linear(work, name, trained, first)) for inside, name in block.items())
        left[layer] = sum(weight.staying for weight in trained.values())
    outside = {name: _weight(work, name, basis.taking, first) for name in work.targets.outside if name in trains}
    return Taken(outside, tuple(weights[layer] for layer in alike), tuple(left[layer] for layer in alike))


def _weight(work: Workload, name: str, taking: Taking, first: bool) -> Weight:
    """Return what the gradient of a target takes and leaves."""
    numel, count = work.numels[name], work.active[name]
    e = work.setting.element_bytes
    dense = formulas.dense_gradient_bytes(numel, e)
    if work.spec.method == "full":
        master = FP32_BYTES * numel if first else 0
        return Weight(dense, 0 if e == FP32_BYTES else master, master)
    buffered = work.is_function(name)
    gathered = formulas.gradients_bytes(count * work.gathered)
    left = gathered if first else 0
    reading = formulas.gather_bytes(count * (work.gathered if buffered else 1), e, by_rows=work.compact)
    if taking == "summing":
        squares = FP32_BYTES * numel * (1 if e == FP32_BYTES else 2) if work.spec.method == "fisher" else 0
        return Weight(dense, squares, 0, buffered)
    if taking == "choosing":
        if work.together:  # nothing is placed before all are scored
            left = formulas.gradients_bytes(count) if first and work.spec.method == "spiel-ag" else 0
            squares = FP32_BYTES * numel if work.spec.method == "fisher" else 0
            budget = OneBudget(work.num_active, sum(work.numels.values()), FP32_BYTES if squares else e)
            return Weight(dense, squares + budget.adding_bytes(numel) + left, left, buffered)
        candidates = formulas.candidates_bytes(count) - formulas.candidate_sums_bytes(count)
        left += candidates if work.spec.method == "spiel-ag" else work.placed_bytes(name)
        reading = formulas.choosing_bytes(numel, count, e, squared=work.spec.method == "fisher", left=left)
        return Weight(dense, reading, left, buffered)
    if work.spec.gradient_way == "sampled" and buffered:
        most = min(work.num_active, numel) if work.together else count
        reading = formulas.sampling_bytes(most, work.setting.tokens, e) + gathered - left
        dense = dense if work.spec.probe_interval else 0
    if work.spec.probe_interval:
        reading = max(reading, formulas.probe_bytes(numel, e))
    return Weight(dense, reading + left, left, buffered)


def _linear(work: Workload, name: str, trained: Mapping[str, Weight], first: bool) -> LinearWeight:
    numel = work.quantised.get(name, 0)
    adapter = None
    if work.adapted and name in work.numels:
        adapter = adapter_of(work.spec, name, work.shape.tensors[name], first)
    e = work.setting.element_bytes
    adding = formulas.adding_bytes(work.active.get(name, 0), e, by_rows=work.compact)
    biased = name.removesuffix("weight") + "bias" in trained
    return LinearWeight(numel, bool(numel), trained.get(name), adapter, adding, biased)
