"""A spec made concrete for the planner: the micro-batch, the targets, how many entries of each are trained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from engine.hardware import Device, selection_memory_bytes
from engine.planner import activations, formulas
from engine.planner.activations import FP32_BYTES, Kernel, Setting
from engine.planner.output_layer import CHUNKED_FAMILIES
from engine.planner.recompute import Kept, kept_by_block
from engine.planner.shape import ModelShape
from engine.planner.target_sizes import (
    TargetSizes,
    indices_bytes,
    num_active,
    quantised_weights,
    sizes_of,
    stored_in_nf4,
    widths_of,
)
from engine.spec import BASELINES, SELECTING, RunSpec
from engine.spec_rules import choosing_micro_steps, entries_move, optimizer_of
from engine.targets import adapter_numel

CHOOSING = (*SELECTING, "magnitude", "spiel-ag")  # that read numbers for it
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, eq=False)
class Workload:
    """A spec made concrete: the micro-batch, the targets, how many entries of each are trained.

    `quantised`: entries of each weight that is stored in NF4. `kernels`: of each block's attention. `kept`: what each
    block keeps for its backward.
    """

    spec: RunSpec
    shape: ModelShape
    setting: Setting
    on_cpu: bool
    targets: TargetSizes
    active: Mapping[str, int]
    quantised: Mapping[str, int]
    kernels: tuple[Kernel, ...]
    kept: tuple[Kept, ...]

    @property
    def numels(self) -> Mapping[str, int]:
        """Entries of each target."""
        return self.targets.numels

    @property
    def largest(self) -> tuple[int, int]:
        """Entries of the largest target, and how many of them are trained."""
        return self.numels[self.targets.largest], self.active[self.targets.largest]

    @property
    def yet_to_choose(self) -> tuple[str, ...]:
        """The targets whose entries are not chosen before those of the last of the largest ones are, itself included.

        Where sums of gradients choose, that is done target by target in their order.
        """
        names = [*self.numels]
        return tuple(names[names.index(self.targets.largest) :])

    @property
    def together(self) -> bool:
        """Whether entries are chosen over all targets, so that the budget may gather in one of them."""
        return self.spec.allocation == "global" and self.spec.method in CHOOSING

    @property
    def chooses_anew(self) -> bool:
        """Whether the entries are there already where they are chosen by gradients, as of the choice before."""
        return self.spec.method == "spiel-ag" or self.spec.reselection_period is not None

    @property
    def most_active(self) -> int:
        """The most trained entries of one tensor that the optimizer sees."""
        return min(self.num_active, max(self.numels.values())) if self.together else max(self.sizes)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained beside the targets."""
        return self.spec.method in ("lora", "ia3")

    @cached_property
    def num_active(self) -> int:
        """Trained entries over all targets."""
        return sum(self.active.values())

    @property
    def selection_micro_steps(self) -> int:
        """Micro-batches of all processes whose gradient chooses; SpIEL-AG's candidates come from a whole step."""
        return choosing_micro_steps(self.spec)

    @property
    def exchanged_bytes(self) -> int:
        """What the processes of a run exchange in a step at most: in an estimation phase also for candidates."""
        if self.spec.num_processes == 1:
            return 0
        return formulas.exchange_bytes(self.gathered * self.num_active + self.shape.dense_numel)

    @property
    def compact(self) -> bool:
        """Whether the entries are kept in little memory."""
        return self.spec.optimizer_states == "compact"

    @property
    def settled_bytes(self) -> int:
        """What entries take that left the choice and keep their change: on the device over NF4, else in main memory."""
        period, steps = self.spec.reselection_period, self.spec.max_steps
        if self.spec.method not in SELECTING or period is None or steps is None:
            return 0
        e = 0 if self.quantised else self.setting.element_bytes
        return formulas.settled_bytes(self.num_active, sum(self.numels.values()), (steps - 1) // period, e)

    @property
    def summed_bytes(self) -> int:
        """Dense gradients that a selection over several micro-batches sums in main memory at once, in each process."""
        whole = formulas.accumulated_gradient_bytes(self.numels)
        allowed = selection_memory_bytes(self.spec.selection_memory_gib) // self.spec.num_processes
        return min(whole, max(allowed, FP32_BYTES * max(self.numels.values())))

    @property
    def values_bytes(self) -> int:
        """The trained values and the base entries that they replace; of full, masters of 16-bit weights."""
        e, values = self.setting.element_bytes, formulas.values_bytes(self.num_active)
        if self.spec.method == "full":
            return values if e != FP32_BYTES else 0
        settled = self.settled_bytes if self.quantised or self.on_cpu else 0
        if self.adapted:
            return values
        return settled + self.kept_bytes(self.num_active) + (0 if self._split else values)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Trained entries of each tensor that the optimizer sees: of lora, two matrices a target."""
        if self.spec.method == "lora":
            shapes = (self.shape.tensors[name] for name in self.numels)
            return tuple(self.spec.lora_rank * side for shape in shapes for side in shape)
        return tuple(self.active.values())

    @cached_property
    def states_bytes(self) -> int:
        """The optimizer's states, wherever they are kept."""
        return self._states_of(self.sizes)

    @property
    def host_states_bytes(self) -> int:
        """What of them lies in main memory beside a GPU."""
        return self._states_of(self.sizes, pinned=True) if self.offloaded else 0

    @property
    def head_states_bytes(self) -> int:
        """Those of a classifier's head, which is trained dense: in fp32, by AdamW where the entries have SM3."""
        name, head = optimizer_of(self.spec), self.shape.dense_numel
        return formulas.optimizer_states_bytes((head,), "adamw" if name == "sm3" else name) if head else 0

    @property
    def gradients_bytes(self) -> int:
        """The gradient of the values, of SpIEL-AG's candidates in an estimation phase, and of a head."""
        return formulas.gradients_bytes(self.gathered * self.num_active + self.shape.dense_numel)

    @property
    def gathered(self) -> int:
        """How many entries' gradients are gathered for each trained one: that of a candidate as well, or its own."""
        return 2 if self.spec.method == "spiel-ag" else 1

    @property
    def candidates_bytes(self) -> int:
        """SpIEL-AG's candidates in an estimation phase, without their gradient."""
        return formulas.candidates_bytes(self.num_active) if self.spec.method == "spiel-ag" else 0

    @property
    def candidate_sums_bytes(self) -> int:
        """What of them is not there yet in the first step of a phase."""
        return formulas.candidate_sums_bytes(self.num_active) if self.spec.method == "spiel-ag" else 0

    @property
    def head_values_bytes(self) -> int:
        """A classifier's head as it was at first, which is kept, and the fp32 masters of a 16-bit one."""
        e, head = self.setting.element_bytes, self.shape.dense_numel
        return e * head + (formulas.values_bytes(head) if e != FP32_BYTES else 0)

    @property
    def offloaded(self) -> bool:
        """Whether the states lie in main memory beside a GPU."""
        return self.spec.offload_states and not self.on_cpu

    @property
    def block_input_bytes(self) -> int:
        """What enters a block, e h T."""
        return self.setting.element_bytes * self.setting.tokens * self.shape.hidden

    @property
    def offloads_inputs(self) -> bool:
        """Whether what enters blocks that are computed anew lies in main memory beside a GPU."""
        return self.spec.offload_activations and not self.on_cpu

    @property
    def update_bytes(self) -> int:
        """What the optimizer's step takes beside what stays; of states in main memory, those of three tensors."""
        spec, largest = self.spec, self.most_active
        brought = 3 * self._states_of((largest,)) if self.offloaded else 0
        return brought + formulas.update_bytes(
            largest,
            optimizer_of(spec),
            ages=self._aged,
            eight_bit=spec.optimizer_states != "float32",
            split=self._split,
            decay=spec.weight_decay > 0,
        )

    @property
    def _split(self) -> bool:
        """Whether a dense base holds half of each value."""
        return self.compact and not self.quantised

    @property
    def _aged(self) -> bool:
        return optimizer_of(self.spec) == "adamw" and entries_move(self.spec)

    def _states_of(self, sizes: tuple[int, ...], *, pinned: bool = False) -> int:
        return formulas.optimizer_states_bytes(
            sizes,
            optimizer_of(self.spec),
            accumulators=self.targets.accumulators,
            ages=self._aged,
            eight_bit=self.spec.optimizer_states != "float32",
            pinned=pinned,
        )

    @cached_property
    def indices_bytes(self) -> int:
        """The positions of the values; a baseline has none."""
        if self.spec.method in BASELINES:
            return 0
        spec = self.spec
        return indices_bytes(self.shape, self.targets, spec.density, spec.num_trainable, self.compact)

    def indices_of(self, names: Iterable[str]) -> int:
        """Return the positions of the entries of some targets."""
        active = {name: self.active[name] for name in names}
        return formulas.indices_bytes(self.numels, active, widths_of(self.shape, active) if self.compact else None)

    def placed_bytes(self, name: str) -> int:
        """Return what the chosen entries of one target take from then on: positions, and what `kept_bytes` says."""
        return self.indices_of([name]) + self.kept_bytes(self.active[name])

    def kept_bytes(self, num_active: int) -> int:
        """Return what `num_active` chosen entries of a dense base keep of it: the entries, split masters in whole."""
        if self.quantised:
            return 0
        if self._split:
            return formulas.split_values_bytes(num_active)
        return formulas.replaced_bytes(num_active, self.setting.element_bytes)

    @property
    def trains_head(self) -> bool:
        """Whether the output layer is a target."""
        return self.shape.head in self.numels

    @property
    def trains_embedding(self) -> bool:
        """Whether an embedding or the norm over it is a target, so that a gradient goes through all blocks."""
        return self.targets.embedding

    @property
    def enters_blocks(self) -> bool:
        """Whether a gradient goes through all blocks: to the embedding, or, with checkpointing, to what it gives.

        There transformers 5 lets the embedding's result require a gradient, whatever is trained.
        """
        return self.trains_embedding or self.spec.gradient_checkpointing

    @property
    def lowest(self) -> int:
        """The first block that a gradient reaches."""
        return 0 if self.enters_blocks else self.targets.lowest

    def is_function(self, name: str) -> bool:
        """Return whether a target's gradient is taken inside its layer's own function: NF4 and plain linear layers."""
        if name in self.quantised:
            return True
        if self.spec.method in BASELINES:
            return False
        return name in self.targets.functions or (
            name == self.shape.head and not self.shape.tied and not self.spec.chunked_loss
        )

    @property
    def predictions(self) -> int:
        """For what an output layer gives logits: all tokens; one of each row, where an encoder is classified by it."""
        return self.setting.rows if self.shape.layout.label_head else self.setting.tokens

    @property
    def chunks_loss(self) -> bool:
        """Whether the loss is computed in chunks of tokens."""
        return self.spec.chunked_loss and self.shape.family in CHUNKED_FAMILIES and not self.shape.classifier

    @property
    def parameters_bytes(self) -> int:
        """The frozen base, as it is stored."""
        dense, stored = stored_in_nf4(self.shape) if self.quantised else (self.shape.num_parameters, 0)
        return formulas.parameters_bytes(dense, self.setting.element_bytes) + stored


def dtype_of(spec: RunSpec, device: Device) -> str:
    """Return the data type of the base weights, with `auto` resolved."""
    return spec.dtype if spec.dtype != "auto" else ("float32" if device.is_cpu else "bfloat16")


def build_workload(spec: RunSpec, shape: ModelShape, device: Device) -> Workload:
    """Return `spec` on a model and a device.

    Raises:
        TargetsError: `targets` match no weight.
    """
    e, rows, length = ELEMENT_BYTES[dtype_of(spec, device)], spec.micro_batch_size, spec.sequence_length
    kernel_of = {
        window: activations.choose_kernel(
            shape, spec.attention, e, rows, length, device.is_cpu, device.sm, window=window
        )
        for window in set(shape.windows)
    }
    kernels = tuple(map(kernel_of.__getitem__, shape.windows))
    masked = next((kernel for kernel in kernels if kernel == "masked"), kernels[0])
    kept = kept_by_block(spec, shape.family, shape.layers)
    setting = Setting(rows, length, e, masked, any(not each.inside for each in kept), device.is_cpu)
    targets = sizes_of(shape, spec.targets, spec.method if spec.method in ("lora", "ia3") else None)
    active = _active(spec, shape, targets)
    quantised = quantised_weights(shape) if spec.quantization == "nf4" else {}
    return Workload(spec, shape, setting, device.is_cpu, targets, active, quantised, kernels, kept)


def _active(spec: RunSpec, shape: ModelShape, targets: TargetSizes) -> Mapping[str, int]:
    """Return the trained entries of each target, those of the adapter beside it where there is one."""
    numels = targets.numels
    if spec.method == "full":
        return numels
    if spec.method == "lora" or spec.method == "ia3":
        return {name: adapter_numel(name, shape.tensors[name], spec.method, spec.lora_rank) for name in numels}
    return num_active(targets, spec.density, spec.num_trainable)
