"""An ordinary step never makes the host wait for the device: what would, is counted over real runs.

On the CPU every operation is seen, but not what leaves the device; on the meta device standing for a GPU that is seen.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.batches import prepare_data
from engine.data.moving import KnownMask
from engine.data.steps import BatchFeed, take_step
from engine.errors import TrainingError
from engine.events import Event, Selected, Stepped
from engine.hardware import Device
from engine.models import load_model, load_tokenizer
from engine.planner import trace
from engine.planner.scenario import Scenario
from engine.planner.stand_in import standing_for
from engine.planner.storages import StorageMeter
from engine.spec import RunSpec
from engine.train import figures, loop
from engine.train.control import NeverAsked
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

_aten = torch.ops.aten
CARD = Device("cuda:0", "A card", 2**36, 2**36)
METHODS = ["sift", "spiel-ag", "spiel-ma", "lora"]
# How entries, states, weights and what the backward needs may be kept; enough entries that states are in 8 bit.
KEPT: dict[str, dict[str, Any]] = {
    "8 bit": {"optimizer_states": "8bit", "density": 0.9},
    "compact": {"optimizer_states": "compact", "density": 0.9, "dtype": "bfloat16"},
    "compact over NF4": {"optimizer_states": "compact", "density": 0.9, "quantization": "nf4"},
    "elementwise": {"recompute": "elementwise", "chunked_loss": True},
    "mlp": {"recompute": "mlp", "chunked_loss": True},
    "blocks": {"recompute": "blocks", "recompute_blocks": 1},
    "checkpointing over NF4": {"gradient_checkpointing": True, "quantization": "nf4", "dtype": "bfloat16"},
}
# Operations whose result has a size that hangs on numbers, or that are the numbers.
ASKING = (
    *(_aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select),
    *(_aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount),
)
SIZED = {_aten.repeat_interleave.Tensor}


class Watch:
    """Notes what waits, by the step that it is in; steps that choose or probe may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: Counter[tuple[int, str]] = Counter()
        self.reads: list[int] = []  # the newest step of each look at figures
        self._step = 0
        self._reading = False
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step, read, tolist = Trainer._optimizer_step, figures.read_figures, Tensor.tolist

        def watched_step(trainer: Trainer, number: int) -> Any:
            self._step = 0 if trainer._looks_in(number) else number
            try:
                return step(trainer, number)
            finally:
                self._step = 0

        def watched_read(steps: Any, peers: Any) -> Any:
            self.reads.append(steps[-1].step)
            self._reading = True
            try:
                return read(steps, peers)
            finally:
                self._reading = False

        def watched_tolist(tensor: Tensor) -> Any:
            self.saw("tolist")
            return tolist(tensor)

        monkeypatch.setattr(Trainer, "_optimizer_step", watched_step)
        for module in (figures, loop):
            monkeypatch.setattr(module, "read_figures", watched_read)
        monkeypatch.setattr(Tensor, "tolist", watched_tolist)

    def saw(self, what: str) -> None:
        if self._step and not self._reading:
            self.waits[self._step, what] += 1


class Asking(TorchDispatchMode):
    """Tells a watch of every operation that asks for numbers."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func in (_aten.index.Tensor, _aten.index_put_.default) else ()
        masked = any(each is not None and each.dtype == torch.bool for each in chosen)
        if masked or func.overloadpacket in ASKING or (func in SIZED and not (kwargs or {}).get("output_size")):
            self._watch.saw(str(func))
        return func(*args, **(kwargs or {}))


class Leaving(Scenario):
    """Tells a watch of everything that leaves the device."""

    def __init__(self, watch: Watch) -> None:
        super().__init__({0: 64}, on_cpu=False)
        self._watch = watch

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            leaves = func is _aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu"
            copied = func is _aten.copy_.default and not first.is_meta
            if leaves or copied or func.overloadpacket in ASKING:
                self._watch.saw(str(func))
        return super().run(func, args, kwargs)


def _spec(model: Path, dataset: Path, method: str, interval: int, **fields: Any) -> RunSpec:
    values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 12, "sequence_length": 48, "period": 8}
    values |= {"estimation_steps": 4, "micro_batch_size": 2, "gradient_accumulation": 4, "probe_interval": 6}
    return RunSpec(
        model=str(model), dataset=str(dataset), method=method, logging_interval=interval, **{**values, **fields}
    )


def _trainer(spec: RunSpec) -> tuple[Trainer, list[Event]]:
    device, tokenizer = torch.device("cpu"), load_tokenizer(spec)
    model = load_model(spec, device)
    tuning = start_tuning(model, spec)
    events: list[Event] = []
    return Trainer(
        spec,
        model,
        tokenizer,
        prepare_data(spec, tokenizer),
        tuning,
        tuning.make_optimizer(),
        events.append,
        NeverAsked(),
        lambda _: None,
        MemoryMeter(device),
    ), events


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_ordinary_steps_ask_nothing_and_figures_are_read_together(
    method: str, interval: int, model_folder: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, events = _trainer(_spec(model_folder, dataset_folder, method, interval))
    ordinary = [step for step in range(1, 13) if not trainer._looks_in(step)]
    watch = Watch(monkeypatch)
    with Asking(watch):
        trainer.run()
    assert not watch.waits
    assert len(ordinary) >= 4
    for step in ordinary:
        assert watch.reads.count(step) == (step % interval == 0 or trainer._looks_in(step + 1) or step == 12), step
    assert [event.step for event in events if isinstance(event, Stepped)] == [*range(1, 13)]


@pytest.mark.parametrize(
    ("method", "kept"),
    [*((method, "") for method in METHODS), *((method, kept) for method in ("sift", "spiel-ag") for kept in KEPT)],
)
def test_nothing_leaves_a_gpu_but_the_figures(
    method: str, kept: str, model_folder: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One phase only: where entries move to hangs on numbers, which are not there."""
    fields = {"max_steps": 7, "estimation_steps": 7, "probe_interval": 0, **KEPT.get(kept, {})}
    spec = _spec(model_folder, dataset_folder, method, 5, **fields)
    watch = Watch(monkeypatch)
    model = trace.describe_model(spec, torch.device("cuda"))
    with standing_for(False):
        trace.record(model, spec, StorageMeter(Leaving(watch), workspaces=True), trace.rows(spec, padded=True))
    assert not watch.waits
    assert {5, 7} <= set(watch.reads)


def test_what_asks_is_seen(model_folder: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters count: a step that looks at its loss, and one that takes entries by a mask."""
    trainer, _ = _trainer(_spec(model_folder, dataset_folder, "random", 5, max_steps=5, probe_interval=0))
    watch, inner = Watch(monkeypatch), trainer.tuning.end_micro_step

    def asking() -> None:
        mask = trainer.tuning.values[0] > 0
        _ = trainer.tuning.values[0][mask], float(mask.sum()), mask.tolist()
        inner()

    monkeypatch.setattr(trainer.tuning, "end_micro_step", asking)
    with Asking(watch):
        trainer.run()
    assert watch.waits == {
        (step, what): 4
        for step in range(2, 6)
        for what in ("aten.index.Tensor", "aten._local_scalar_dense.default", "tolist")
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_reported_with_its_own_figures_however_late(
    method: str, model_folder: Path, dataset_folder: Path
) -> None:
    reported = []
    for interval in (1, 5):
        trainer, events = _trainer(_spec(model_folder, dataset_folder, method, interval))
        trainer.run()
        kinds = [event for event in events if isinstance(event, Stepped | Selected)]
        reported.append([(e.step, e.loss, e.gradient_norm) if isinstance(e, Stepped) else e for e in kinds])
        elapsed = [event.elapsed_s for event in events if isinstance(event, Stepped)]
        assert elapsed == sorted(elapsed)
    assert reported[0] == reported[1]


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_what_is_not_finite_is_found_at_the_look_and_nothing_is_saved(
    part: str, model_folder: Path, dataset_folder: Path
) -> None:
    trainer, events = _trainer(_spec(model_folder, dataset_folder, "random", 10, probe_interval=0))
    saved: list[int] = []
    trainer.save = lambda trainer: saved.append(trainer.step)
    trainer.control.checkpoint_requested = lambda: trainer.step == 7  # type: ignore[method-assign]
    inner = trainer._backward

    def broken(batch: Any, labelled: int) -> Tensor:
        loss = inner(batch, labelled)
        if trainer.step == 3 and part == "gradient":
            trainer.tuning.values[0].grad.fill_(math.inf)  # type: ignore[union-attr]
        return loss * math.nan if trainer.step == 3 and part == "loss" else loss

    trainer._backward = broken  # type: ignore[method-assign]
    message = {"loss": "The loss became nan after step 3", "gradient": "The gradient became inf in step 4"}
    with pytest.raises(TrainingError, match=message[part]):
        trainer.run()
    assert trainer.step == 7
    assert not saved
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3]


def test_batches_made_ahead_are_those_made_when_asked_for(model_folder: Path, dataset_folder: Path) -> None:
    spec = _spec(model_folder, dataset_folder, "sift", 1)
    rows = prepare_data(spec, load_tokenizer(spec)).training
    made: list[int] = []

    def make(step: int) -> Any:
        made.append(step)
        return take_step(rows, spec, step)

    feed = BatchFeed(make, ahead=True)
    for step in (1, 2, 3, 7, 8):
        for ours, theirs in zip(feed.take(step).batches, take_step(rows, spec, step).batches, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert ours.labelled_tokens == theirs.labelled_tokens
    feed.take(9)
    assert {step: made.count(step) for step in (1, 2, 3, 4, 7, 8)} == dict.fromkeys((1, 2, 3, 4, 7, 8), 1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_answers_what_the_host_knows(whole: bool) -> None:
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = int(whole)
    known = KnownMask.of(mask, torch.device("cpu"))
    ask: list[Callable[[Tensor], bool]] = [
        lambda each: bool(each.all()),
        lambda each: bool(each.sum() == each.numel()),
        lambda each: bool(each[:, :5].to(torch.bool).view(2, -1).all()),
    ]
    assert [question(known) for question in ask] == [question(mask) for question in ask] == [whole] * 3
    part = known[:, :3]
    assert type(part) is Tensor
    assert bool(part.all())
    assert torch.equal(known.cumsum(1), mask.cumsum(1))
    known[0, 0] = 0
    assert not known.all()
