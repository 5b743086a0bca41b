"""The peak memory of one spec on one model and device, by part.

Peak = resident terms + the most that one of four moments adds: the loss, the backward of one block, the optimizer step,
the selection of the trained entries in the first step. The micro-batch is taken as filled to `sequence_length`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from engine.hardware import Device, budget_bytes_of
from engine.planner import activations, formulas
from engine.planner.activations import Setting, TrainedParts
from engine.planner.shape import ModelShape, target_tensors
from engine.spec import RunSpec
from engine.targets import layer_number, num_active_of

Verdict = Literal["fits", "tight", "does not fit"]
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Around what comes and goes. The closed forms lie within 1 percent of a trace of the real classes on the checked
# families; the allocator's rounding and fragments come on top, more of them in the C library's heap. Of eight other
# families the traces lay between 0.76 and 1.27 of the Llama layout's.
CUDA_MARGINS = (0.97, 1.08)
CPU_MARGINS = (0.90, 1.20)
GENERIC_MARGINS = (0.65, 1.40)
# Around what stays: the counts are exact, the allocator rounds up. Without weights to count, a guess.
RESIDENT_MARGINS = (1.00, 1.01)
# Process, CUDA context and library workspaces differ by machine, driver and build.
SURROUNDINGS_MARGINS = (0.65, 1.35)


@dataclass(frozen=True)
class Remedy:
    """A change of the spec that lowers the peak by `saved_bytes`; `cost` says what it costs."""

    title: str
    saved_bytes: int
    changes: dict[str, Any]
    cost: str


@dataclass(frozen=True)
class Plan:
    """What a run will need on its device. `parts` are bytes at the peak and add up to `peak_bytes`.

    `host_bytes`: main memory that the selection needs beside a run on a GPU. `exact`: whether the closed forms were
    checked on this family of models; `note` says so where they were not.
    """

    parts: dict[str, int]
    peak_bytes: int
    lower_bytes: int
    upper_bytes: int
    budget_bytes: int
    phase: str
    verdict: Verdict
    remedies: tuple[Remedy, ...]
    device: str
    num_parameters: int
    num_active: int
    target_numel: int
    host_bytes: int
    exact: bool
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {**asdict(self), "remedies": [asdict(remedy) for remedy in self.remedies]}


@dataclass(frozen=True)
class Moment:
    """A moment that may be the peak: what is saved for the backward and what comes and goes, in bytes."""

    phase: str
    saved: int
    transient: int
    has_states: bool = True

    @property
    def total(self) -> int:
        """Bytes beyond the resident terms."""
        return self.saved + self.transient


@dataclass(frozen=True)
class TargetSizes:
    """The targets of a spec: entries of each, the largest of all, the entries of the largest inside the blocks."""

    numels: Mapping[str, int]
    largest: str
    largest_in_blocks: int
    parts: tuple[TrainedParts, ...]


@dataclass(frozen=True, eq=False)
class Workload:
    """A spec made concrete: the micro-batch, the targets, how many entries of each are trained."""

    spec: RunSpec
    shape: ModelShape
    setting: Setting
    on_cpu: bool
    targets: TargetSizes
    active: Mapping[str, int]

    @property
    def numels(self) -> Mapping[str, int]:
        """Entries of each target."""
        return self.targets.numels

    @property
    def largest(self) -> tuple[int, int]:
        """Entries of the largest target, and how many of them are trained."""
        return self.numels[self.targets.largest], self.active[self.targets.largest]

    @property
    def selection_micro_steps(self) -> int:
        """Micro-batches whose gradient chooses the entries."""
        return self.spec.selection_micro_steps or self.spec.gradient_accumulation

    @property
    def trains_head(self) -> bool:
        """Whether the output layer is a target."""
        return self.shape.head in self.numels

    @property
    def block_dense_bytes(self) -> int:
        """The largest dense gradient inside the blocks; that of a tied output layer waits for the embedding's."""
        tied = self.numels.get(self.shape.head or "", 0) if self.shape.tied else 0
        return formulas.dense_gradient_bytes(self.targets.largest_in_blocks + tied, self.setting.element_bytes)


def estimate(spec: RunSpec, shape: ModelShape, device: Device) -> Plan:
    """Return the plan of `spec` without remedies.

    Raises:
        TargetsError: `targets` match no weight.
    """
    work = _workload(spec, shape, device)
    resident = _resident(work)
    moment = max(_moments(work), key=lambda each: each.total + (resident["optimizer_states"] if each.has_states else 0))
    if not moment.has_states:
        resident["optimizer_states"] = 0
    surroundings = {
        "workspace": formulas.workspace_bytes(work.on_cpu),
        "context": formulas.context_bytes(work.on_cpu),
    }
    parts = resident | {"saved_activations": moment.saved, "transients": moment.transient} | surroundings
    peak, budget = sum(parts.values()), budget_bytes_of(spec.budget_gib, device)
    lower, upper = _bounds(work, sum(resident.values()), moment.total, sum(surroundings.values()))
    return Plan(
        parts=parts,
        peak_bytes=peak,
        lower_bytes=lower,
        upper_bytes=upper,
        budget_bytes=budget,
        phase=moment.phase,
        verdict="fits" if upper <= budget else "tight" if peak <= budget else "does not fit",
        remedies=(),
        device=device.label,
        num_parameters=shape.num_parameters,
        num_active=sum(work.active.values()),
        target_numel=sum(work.numels.values()),
        host_bytes=0 if work.on_cpu else _selection_host_bytes(work),
        exact=shape.exact,
        note=_note(shape),
    )


def _bounds(work: Workload, resident: int, moving: int, surroundings: int) -> tuple[int, int]:
    staying = RESIDENT_MARGINS if work.shape.counted else GENERIC_MARGINS
    checked = CPU_MARGINS if work.on_cpu else CUDA_MARGINS
    margins = checked if work.shape.exact else GENERIC_MARGINS
    low, high = (
        int(resident * staying[side] + moving * margins[side] + surroundings * SURROUNDINGS_MARGINS[side])
        for side in (0, 1)
    )
    return low, high


def _note(shape: ModelShape) -> str:
    if shape.exact:
        return ""
    if not shape.counted:
        return f"Sizes are guessed: there are no weights to count and the family {shape.family!r} is not known."
    return f"The formulas were not checked on models of the family {shape.family!r}, so the range is wide."


def _workload(spec: RunSpec, shape: ModelShape, device: Device) -> Workload:
    dtype = spec.dtype if spec.dtype != "auto" else ("float32" if device.is_cpu else "bfloat16")
    e, rows, length = ELEMENT_BYTES[dtype], spec.micro_batch_size, spec.sequence_length
    kernel = activations.choose_kernel(shape, spec.attention, e, rows, length, device.is_cpu)
    targets = _sizes_of(shape, spec.targets)
    setting = Setting(rows, length, e, kernel, spec.gradient_checkpointing)
    active = num_active_of(targets.numels, spec.density, spec.num_trainable)
    return Workload(spec, shape, setting, device.is_cpu, targets, active)


@lru_cache(maxsize=64)
def _sizes_of(shape: ModelShape, targets: str | tuple[str, ...]) -> TargetSizes:
    numels = {name: math.prod(sizes) for name, sizes in target_tensors(shape, targets).items()}
    in_blocks = (numel for name, numel in numels.items() if layer_number(name) is not None)
    largest = max(numels, key=lambda name: numels[name])
    return TargetSizes(numels, largest, max(in_blocks, default=0), tuple(activations.trained_parts(shape, numels)))


def _resident(work: Workload) -> dict[str, int]:
    e, count = work.setting.element_bytes, sum(work.active.values())
    return {
        "parameters": formulas.parameters_bytes(work.shape.num_parameters, e),
        "values": formulas.values_bytes(count) + formulas.replaced_bytes(count, e),
        "indices": formulas.indices_bytes(work.numels, work.active),
        "gradients": formulas.gradients_bytes(count),
        "optimizer_states": formulas.optimizer_states_bytes(count, work.spec.optimizer),
    }


def _moments(work: Workload) -> list[Moment]:
    e, spec = work.setting.element_bytes, work.spec
    probe = formulas.probe_bytes(work.largest[0], e) if spec.probe_interval else 0
    reading = max(formulas.gather_bytes(work.active, e), probe)
    update = Moment("optimizer step", 0, formulas.write_back_bytes(work.active, e))
    return [*_step_moments(work, reading), update, *_selection_moments(work)]


def _step_moments(work: Workload, reading: int, extra: int = 0) -> list[Moment]:
    """Return the loss and the backward of a block.

    Args:
        work: what runs.
        reading: what reads a dense gradient beside it.
        extra: what else lies in memory meanwhile.
    """
    shape, setting = work.shape, work.setting
    saved = activations.blocks_saved_bytes(shape, setting, work.targets.parts)
    saved += activations.shared_saved_bytes(shape, setting)
    flows = any(part.reached for part in work.targets.parts) or shape.embedding in work.numels
    norm_trained = any(name.endswith(("model.norm.weight", "ln_f.weight")) for name in work.numels)
    head = activations.head_saved_bytes(shape, setting, norm_trained, work.trains_head) if flows else 0
    moments = [Moment("loss", saved + head, activations.loss_transient_bytes(shape, setting) + extra)]
    if work.trains_head:
        dense = formulas.dense_gradient_bytes(shape.vocabulary * shape.hidden, setting.element_bytes)
        logits = setting.element_bytes * shape.vocabulary * setting.tokens
        moments.append(Moment("backward of the output layer", saved + head, logits + dense + reading + extra))
    reached = {part for part in work.targets.parts if part.reached}
    for part in reached:
        dense = work.block_dense_bytes + reading
        added = activations.block_backward_bytes(shape, setting, part, dense)
        moments.append(_block_moment(saved, added, extra))
    return moments


def _block_moment(saved: int, added: int, extra: int) -> Moment:
    # Below zero: the block has freed more than its backward made, and the saved part is smaller by that.
    return Moment("backward of one block", saved + min(added, 0), max(added, 0) + extra)


def _selection_moments(work: Workload) -> list[Moment]:
    """Return the moments of the first step in which the entries are chosen; there are no optimizer states yet."""
    (numel, count), e = work.largest, work.setting.element_bytes
    if work.spec.method == "random":
        drawn = formulas.draw_bytes(numel, count) if work.on_cpu else 0
        return [Moment("selection", 0, drawn, has_states=False)]
    if work.selection_micro_steps == 1:
        steps = _step_moments(work, formulas.topk_bytes(numel, count, e))
    else:
        # The sums lie in main memory; each tensor's is brought to the device when its entries are chosen.
        summed = formulas.accumulated_gradient_bytes(work.numels)
        steps = _step_moments(work, formulas.gather_bytes(work.active, e), summed if work.on_cpu else 0)
        top = formulas.topk_bytes(numel, count, formulas.FP32_BYTES)
        steps.append(Moment("selection", 0, top + (summed if work.on_cpu else formulas.FP32_BYTES * numel)))
    return [Moment("selection", step.saved, step.transient, has_states=False) for step in steps]


def _selection_host_bytes(work: Workload) -> int:
    """Return the main memory that the selection of a GPU run needs."""
    numel, count = work.largest
    if work.spec.method == "random":
        return formulas.draw_bytes(numel, count)
    if work.selection_micro_steps == 1:
        return 0
    return formulas.accumulated_gradient_bytes(work.numels) + formulas.FP32_BYTES * numel
