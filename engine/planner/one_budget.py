"""What one budget over all weights takes at the most, where nothing is known of how it falls."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.hardware import Device
from engine.planner import formulas
from engine.planner.formulas import FP32_BYTES, INT64_BYTES
from engine.planner.headers import Shape
from engine.planner.workload import ELEMENT_BYTES, dtype_of
from engine.spec import RunSpec
from engine.spec_rules import choosing_micro_steps, entries_move, optimizer_of
from engine.targets import match_targets, num_active_of


@dataclass(frozen=True)
class OneBudget:
    """The choice of `num_active` entries of `target_numel` in all, by scores of `element_bytes` each; bytes.

    As `engine.sparse.selection.GlobalChoice` does it, while weights come one by one. It keeps up to twice the budget.
    """

    num_active: int
    target_numel: int
    element_bytes: int

    @property
    def kept(self) -> int:
        """Entries that are kept for a choice."""
        return min(2 * self.num_active, self.target_numel)

    @property
    def kept_bytes(self) -> int:
        """Of each that is kept its position, what it ranks by and its gradient."""
        return self._each * self.kept

    @property
    def _each(self) -> int:
        return 2 * FP32_BYTES + self.element_bytes

    def adding_bytes(self, numel: int) -> int:
        """Return what taking in a weight takes beside: its scores, in fp32 as well; then the places of all of them.

        Or those that may be chosen, kept beside what was, all ranks joined, and of the best a rank and a place.
        """
        ranks = FP32_BYTES if self.element_bytes != FP32_BYTES else 0
        new = min(numel, self.num_active)
        joined = min(2 * self.num_active + new, self.target_numel)
        cutting = INT64_BYTES * new + self._each * (joined - self.kept) + FP32_BYTES * joined + self._best_bytes
        return (self.element_bytes + ranks) * numel + max((INT64_BYTES + 1) * numel, cutting)

    @property
    def finishing_bytes(self) -> int:
        """What is kept in the end, its ranks joined, a mask, and of the best a rank and a place."""
        return self.kept_bytes + (FP32_BYTES + 1) * self.kept + self._best_bytes

    @property
    def _best_bytes(self) -> int:
        return (FP32_BYTES + INT64_BYTES) * self.num_active


def one_budget_bytes(spec: RunSpec, tensors: Mapping[str, Shape], device: Device) -> int:
    """Return the most that one budget takes beside what equal shares of it take.

    The choice over all weights; or what comes and goes of a weight that gets all it can: in its gradient by sampled
    products, its update, its write-back, or SpIEL's replacement among all. Over NF4, whenever that weight is used, its
    values are added to it. Traces know only the equal shares of these.

    Args:
        spec: of a method that chooses.
        tensors: the weights that may be targets, name to shape.
        device: where it runs.
    """
    numels = {name: math.prod(tensors[name]) for name in match_targets(tensors, spec.targets)}
    total = sum(num_active_of(numels, spec.density, spec.num_trainable).values())
    most, e = min(total, max(numels.values())), ELEMENT_BYTES[dtype_of(spec, device)]
    summed = spec.method == "fisher" or choosing_micro_steps(spec) > 1
    compact, eight_bit = spec.optimizer_states == "compact", spec.optimizer_states != "float32"
    ages = optimizer_of(spec) == "adamw" and entries_move(spec)
    budget = OneBudget(total, sum(numels.values()), FP32_BYTES if summed else e)
    passing = [
        budget.kept_bytes + budget.adding_bytes(max(numels.values())),
        budget.finishing_bytes,
        formulas.update_bytes(most, optimizer_of(spec), ages=ages, eight_bit=eight_bit, split=compact, decay=True),
        formulas.write_back_bytes(most, e),
    ]
    if spec.gradient_way == "sampled":
        passing.append(formulas.sampling_bytes(most, spec.micro_batch_size * spec.sequence_length, e))
    if spec.method == "spiel-ag":
        passing.append(formulas.replacing_together_bytes(total, most))
    adding = formulas.adding_bytes(most, e, by_rows=compact) if spec.quantization == "nf4" else 0
    return adding + max(passing)
