"""Traces a training step of the real model class on the meta device: what it holds in memory, when, because of what.

The trace runs the training loop itself, with the tuning, the optimizer and the loss of a run, over a model whose
tensors have sizes and no numbers: what it counts is what the run does. Two optimizer steps are traced, the first of
which chooses entries where the method does, of at most two micro-batches each: more repeat the second.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.data.batches import PreparedData
from engine.data.classification import LabelledExamples
from engine.data.examples import Examples
from engine.data.labels import Labels
from engine.events import DataPrepared
from engine.hardware import Device
from engine.models import describe_classifier, describe_model
from engine.planner.ledger import (
    BACKWARD,
    FORWARD,
    HOST,
    LOGITS,
    LOSS,
    OPTIMIZER,
    ROUNDING_BYTES,
    SELECTION,
    WRITE_BACK,
    Figures,
    Ledger,
    add_up,
)
from engine.planner.one_budget import one_budget_bytes
from engine.planner.scenario import Scenario
from engine.planner.short_run import rows, traced_spec
from engine.planner.stand_in import standing_for
from engine.planner.storages import StorageMeter
from engine.planner.workload import CHOOSING
from engine.sparse.attach import SparseTuning
from engine.sparse.base_weight import base_weights, packed_tensors
from engine.sparse.optim import SparseAdamW
from engine.sparse.spiel_ag import SpielAG
from engine.spec import BASELINES, RunSpec
from engine.targets import num_active_of
from engine.train.control import NeverAsked
from engine.train.head import HeadedTuning, JoinedOptimizer
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import Tuning, start_tuning


def trace(spec: RunSpec, device: Device, *, padded: bool | None = None, rounding: int = ROUNDING_BYTES) -> Figures:
    """Return what a run of `spec` on `device` holds in memory.

    How one budget over all weights (`allocation: global`) falls hangs on numbers that a trace has not. It takes equal
    shares, and beside them, all the time, the most that the choice, or a weight that gets all it can, takes more.

    Args:
        spec: rows are taken as `sequence_length` long.
        device: the target; its kind decides the kernels and whether main memory is another memory.
        padded: whether rows have different lengths; by default where a micro-batch has several.
        rounding: bytes that each storage is rounded up to a multiple of; 512 on CUDA, 0 for none.

    Raises:
        ModelError: the model cannot be built from its config.
        TargetsError: `targets` match no weight.
    """
    return add_up(trace_events(spec, device, padded=padded), rounding, host_apart=not device.is_cpu)


def trace_events(spec: RunSpec, device: Device, *, padded: bool | None = None) -> Ledger:
    """Return the life of every storage of a run of `spec` on `device`; see `trace`."""
    asked, spec = spec, traced_spec(spec)
    target = torch.device("cpu" if device.is_cpu else "cuda")
    model, head = (
        describe_classifier(spec, target) if spec.task == "classification" else (describe_model(spec, target), ())
    )
    scenario = Scenario(_grown_by_rows(model, spec), on_cpu=device.is_cpu)
    meter = StorageMeter(scenario, workspaces=not device.is_cpu)
    if asked.allocation == "global" and asked.method in CHOOSING:
        weights = {name: weight for name, weight in base_weights(model).items() if name not in head}
        gathered = one_budget_bytes(asked, {name: tuple(weight.shape) for name, weight in weights.items()}, device)
        meter.ledger.open(gathered, "one budget", "", "transients")
    with standing_for(device.is_cpu):
        record(model, spec, meter, rows(spec, spec.micro_batch_size > 1 if padded is None else padded), head)
    if spec.offload_states and not device.is_cpu:
        meter.ledger.move("optimizer_states", HOST)
    return meter.ledger


def count_real(
    model: PreTrainedModel, spec: RunSpec, *, padded: bool | None = None, head: Sequence[str] = ()
) -> Ledger:
    """Return the life of every storage of a short run of `spec` with a real model; twin of `trace_events`.

    Args:
        model: of `load_model`, on the CPU; it is trained.
        spec: as for `trace`; the device is the CPU.
        padded: as for `trace`.
        head: names of the parameters of a classifier's head.
    """
    spec = traced_spec(spec)
    meter = StorageMeter()
    record(model, spec, meter, rows(spec, spec.micro_batch_size > 1 if padded is None else padded), head)
    return meter.ledger


def record(
    model: PreTrainedModel,
    spec: RunSpec,
    meter: StorageMeter,
    training: Examples | LabelledExamples,
    head: Sequence[str] = (),
) -> None:
    """Train `model` as a run of `spec` does, over `training`, and let `meter` count; `head`: that of a classifier."""
    for parameter in model.parameters():
        for part in packed_tensors(parameter):
            meter.adopt(part, "parameters")
    for buffer in model.buffers():
        meter.adopt(buffer, "parameters")
    with no_garbage():
        with meter:
            tuning = start_tuning(model, spec, head)
            if spec.task == "classification":
                tuning = HeadedTuning(tuning, model, head, _names(model), spec)
            optimizer = tuning.make_optimizer()
            if spec.method == "spiel-ag":
                _seed_states(tuning, optimizer)
            trainer = make_trainer(model, spec, tuning, optimizer, training)
        label = _Labels(meter, model, tuning, optimizer)
        label()
        meter.watch_modules(model)
        _mark_phases(trainer, meter.ledger, label)
        if spec.method in BASELINES:
            _shorten_first_step(trainer)
        with meter:
            trainer.run()
        label()
    meter.ledger.settle()


def _shorten_first_step(trainer: Trainer) -> None:
    """Let the first step, which chooses nothing and only makes states, have one micro-batch."""
    whole, write_back = trainer.spec, trainer.tuning.write_back

    def end_of_step() -> None:
        write_back()
        trainer.spec = whole

    trainer.spec = whole.model_copy(update={"gradient_accumulation": 1})
    trainer.tuning.write_back = end_of_step  # type: ignore[method-assign]


def _seed_states(tuning: Tuning, optimizer: torch.optim.Optimizer) -> None:
    """Make the states of all entries: SpIEL-AG's phases but the first choose their candidates beside them."""
    if isinstance(tuning, HeadedTuning) and isinstance(optimizer, JoinedOptimizer):
        tuning, optimizer = tuning.inner, optimizer.parts[0]
    if isinstance(optimizer, SparseAdamW):
        for values in tuning.values:
            optimizer.state_of(values)


def make_trainer(
    model: PreTrainedModel,
    spec: RunSpec,
    tuning: Tuning,
    optimizer: torch.optim.Optimizer,
    training: Examples | LabelledExamples,
) -> Trainer:
    """Return the training loop of `spec` over `training`, without files, evaluation or anybody who asks."""
    summary = DataPrepared("", {}, "", len(training), len(training), 0, {}, training.tokens, training.labelled_tokens)
    labels = Labels(_names(model)) if spec.task == "classification" else None
    data = PreparedData(training, Examples(), [], summary, labels)
    unused: Any = None
    return Trainer(
        spec,
        model,
        unused,
        data,
        tuning,
        optimizer,
        lambda _: None,
        NeverAsked(),
        lambda _: None,
        MemoryMeter(torch.device("cpu")),
    )


def _names(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(str(number) for number in range(model.config.num_labels or 0))


@contextmanager
def no_garbage() -> Iterator[None]:
    """Keep Python's collector away: it would free cycles at moments that say nothing, and go through all of torch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mark_phases(trainer: Trainer, ledger: Ledger, label: "_Labels") -> None:
    """Let the ledger know what the trainer is at, and have the parts told at the end of each phase."""

    def around(owner: object, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def marked(*args: Any) -> Any:
            label()
            ledger.enter(phase)
            result = inner(*args)
            label()
            return result

        setattr(owner, name, marked)

    def enter_forward(*_: Any) -> None:
        if ledger.phase != FORWARD and not torch._C._current_autograd_node():
            ledger.enter(FORWARD)

    def leave_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
        label.output(output)
        ledger.enter(LOSS)

    # A loss in chunks calls the body of the model alone.
    last = trainer.model if trainer.chunks is None else trainer.model.base_model
    last.register_forward_pre_hook(enter_forward)
    last.register_forward_hook(leave_forward)
    around(trainer.tuning, "end_micro_step", SELECTION)
    around(trainer.optimizer, "step", OPTIMIZER)
    around(trainer.tuning, "write_back", WRITE_BACK)
    if trainer.tuning.spiel is not None:
        around(trainer.tuning.spiel, "end_step", SELECTION)


class _Labels:
    """Tells the meter which part the tensors of a tuning are, whenever they may be new."""

    def __init__(self, meter: StorageMeter, model: nn.Module, tuning: Tuning, optimizer: torch.optim.Optimizer) -> None:
        self._meter, self._tuning, self._optimizer = meter, tuning, optimizer
        self._base = {id(parameter) for parameter in base_weights(model).values()}

    def __call__(self) -> None:
        for part, tensor in self._parts():
            self._meter.adopt_new(tensor, part)

    def output(self, output: Any) -> None:
        """Say which tensor the logits are, where there are any, and when the gradient of the output is there."""
        tensor = output.logits if "logits" in output else output.last_hidden_state
        if "logits" in output:
            self._meter.adopt(tensor, LOGITS)
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._meter.ledger.enter(BACKWARD))

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        for values in self._tuning.values:
            yield "values", values
            if values.grad is not None:
                yield "gradients", values.grad
        for state in self._optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    yield "optimizer_states", tensor
        inner = self._tuning.inner if isinstance(self._tuning, HeadedTuning) else self._tuning
        if isinstance(inner, SparseTuning):
            for entry in inner.entries:
                yield from entry.resident()
        if isinstance(self._tuning.spiel, SpielAG):
            for each in self._tuning.spiel.candidates.values():
                parts = (each.indices, each.grad, each.total, each.squares)
                yield from (("gradients", part) for part in parts if part is not None)


def _grown_by_rows(model: nn.Module, spec: RunSpec) -> dict[int, int]:
    """Return the most entries that are looked at where new ones are grown, twice those trained, by a weight's rows."""
    weights = base_weights(model)
    active = num_active_of({name: weight.numel() for name, weight in weights.items()}, spec.density, spec.num_trainable)
    counts: dict[int, int] = {}
    for name, count in active.items():
        rows = math.prod(weights[name].shape[:-1])
        counts[rows] = max(counts.get(rows, 0), 2 * count)
    return counts
