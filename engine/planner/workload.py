"""A spec made concrete for the planner: the micro-batch, the targets, how many entries of each are trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from engine.hardware import Device
from engine.planner import activations, formulas
from engine.planner.activations import Setting, TrainedParts
from engine.planner.shape import ModelShape, target_tensors
from engine.spec import RunSpec
from engine.targets import is_linear, layer_number, num_active_of

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TargetSizes:
    """The targets of a spec: entries of each, the largest of all, the entries of the largest inside the blocks.

    `accumulators`: rows and columns of all targets, each seen as a matrix whose columns are its last dimension.
    """

    numels: Mapping[str, int]
    largest: str
    largest_in_blocks: int
    accumulators: int
    parts: tuple[TrainedParts, ...]


@dataclass(frozen=True, eq=False)
class Workload:
    """A spec made concrete: the micro-batch, the targets, how many entries of each are trained.

    `quantised`: entries of each weight that is stored in NF4.
    """

    spec: RunSpec
    shape: ModelShape
    setting: Setting
    on_cpu: bool
    targets: TargetSizes
    active: Mapping[str, int]
    quantised: tuple[int, ...]

    @property
    def numels(self) -> Mapping[str, int]:
        """Entries of each target."""
        return self.targets.numels

    @property
    def largest(self) -> tuple[int, int]:
        """Entries of the largest target, and how many of them are trained."""
        return self.numels[self.targets.largest], self.active[self.targets.largest]

    @property
    def num_active(self) -> int:
        """Trained entries over all targets."""
        return sum(self.active.values())

    @property
    def selection_micro_steps(self) -> int:
        """Micro-batches whose gradient chooses the entries; SpIEL-AG's candidates come from a whole step."""
        chosen = None if self.spec.method == "spiel-ag" else self.spec.selection_micro_steps
        return chosen or self.spec.gradient_accumulation

    @property
    def trains_head(self) -> bool:
        """Whether the output layer is a target."""
        return self.shape.head in self.numels

    @property
    def block_dense_bytes(self) -> int:
        """The largest dense gradient inside the blocks; that of a tied output layer waits for the embedding's."""
        tied = self.numels.get(self.shape.head or "", 0) if self.shape.tied else 0
        return formulas.dense_gradient_bytes(self.targets.largest_in_blocks + tied, self.setting.element_bytes)

    @property
    def parameters_bytes(self) -> int:
        """The frozen base, as it is stored."""
        dense = self.shape.num_parameters - sum(self.quantised)
        stored = sum(formulas.quantised_bytes(numel) for numel in self.quantised)
        return formulas.parameters_bytes(dense, self.setting.element_bytes) + stored

    @property
    def rebuilt_bytes(self) -> int:
        """What the use of the largest NF4 weight takes; 0 over a dense base."""
        return formulas.dequantised_bytes(max(self.quantised, default=0), self.setting.element_bytes)


def build_workload(spec: RunSpec, shape: ModelShape, device: Device) -> Workload:
    """Return `spec` on a model and a device.

    Raises:
        TargetsError: `targets` match no weight.
    """
    dtype = spec.dtype if spec.dtype != "auto" else ("float32" if device.is_cpu else "bfloat16")
    e, rows, length = ELEMENT_BYTES[dtype], spec.micro_batch_size, spec.sequence_length
    kernel = activations.choose_kernel(shape, spec.attention, e, rows, length, device.is_cpu)
    targets = _sizes_of(shape, spec.targets)
    setting = Setting(rows, length, e, kernel, spec.gradient_checkpointing)
    active = num_active_of(targets.numels, spec.density, spec.num_trainable)
    quantised = _quantised(shape) if spec.quantization == "nf4" else ()
    return Workload(spec, shape, setting, device.is_cpu, targets, active, quantised)


@lru_cache(maxsize=16)
def _quantised(shape: ModelShape) -> tuple[int, ...]:
    """Return the entries of each weight that bitsandbytes quantises: the linear layers of the blocks."""
    return tuple(math.prod(sizes) for name, sizes in shape.tensors.items() if is_linear(name, sizes))


@lru_cache(maxsize=64)
def _sizes_of(shape: ModelShape, targets: str | tuple[str, ...]) -> TargetSizes:
    tensors = target_tensors(shape, targets)
    numels = {name: math.prod(sizes) for name, sizes in tensors.items()}
    accumulators = sum(numels[name] // sizes[-1] + sizes[-1] for name, sizes in tensors.items())
    in_blocks = (numel for name, numel in numels.items() if layer_number(name) is not None)
    largest = max(numels, key=lambda name: numels[name])
    parts = tuple(activations.trained_parts(shape, numels))
    return TargetSizes(numels, largest, max(in_blocks, default=0), accumulators, parts)
