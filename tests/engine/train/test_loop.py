"""The training loop in this process: what it computes, in fp64 where equality is claimed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.batches import prepare_data
from engine.errors import TrainingError
from engine.events import Event, Probed, Selected, Stepped, Warned
from engine.models import load_model, load_tokenizer
from engine.spec import RunSpec, choices
from engine.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from engine.train.loop import Trainer, learning_rate_at
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

Make = Callable[..., tuple[Trainer, list[Event]]]


class _NeverAsked:
    def stop_requested(self) -> bool:
        return False

    def checkpoint_requested(self) -> bool:
        return False


@pytest.fixture
def make(model_folder: Path, dataset_folder: Path) -> Make:
    def make_trainer(**fields: Any) -> tuple[Trainer, list[Event]]:
        values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 6, "sequence_length": 64, "probe_interval": 0}
        spec = RunSpec(model=str(model_folder), dataset=str(dataset_folder), **{**values, **fields})
        device = torch.device("cpu")
        tokenizer = load_tokenizer(spec)
        model = load_model(spec, device).double()
        tuning = start_tuning(model, spec)
        optimizer = tuning.make_optimizer()
        events: list[Event] = []
        trainer = Trainer(
            spec,
            model,
            tokenizer,
            prepare_data(spec, tokenizer),
            tuning,
            optimizer,
            events.append,
            _NeverAsked(),
            lambda _: None,
            MemoryMeter(device),
        )
        return trainer, events

    return make_trainer


def _result(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in trainer.tuning.state().items() if "candidates" not in name}


@pytest.mark.parametrize("method", ["sift", "spiel-ag", "spiel-ma", "lora", "ia3", "full"])
@pytest.mark.parametrize(("rows", "accumulation"), [(2, 4), (1, 8)])
def test_accumulation_changes_nothing(make: Make, method: str, rows: int, accumulation: int) -> None:
    """Rows have unequal label counts, so this holds only because the loss is per labelled token of the step."""
    fields = {"method": method, "period": 3, "estimation_steps": 2}
    whole, _ = make(micro_batch_size=8, gradient_accumulation=1, **fields)
    split, _ = make(micro_batch_size=rows, gradient_accumulation=accumulation, **fields)
    whole.run()
    split.run()
    for name, tensor in _result(whole).items():
        torch.testing.assert_close(tensor, _result(split)[name], atol=1e-9, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", choices("method"))
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(
    make: Make, tmp_path: Path, method: str, accumulation: int
) -> None:
    """The checkpoint falls into an estimation phase, between its first step and its last."""
    fields = {
        "method": method,
        "period": 4,
        "estimation_steps": 3,
        "max_steps": 12,
        "micro_batch_size": 2,
        "gradient_accumulation": accumulation,
    }
    whole, _ = make(**fields)
    whole.save = lambda trainer: save_checkpoint(tmp_path, trainer.tuning, trainer.optimizer, Progress(6, 0.0, 0))
    whole.control.checkpoint_requested = lambda: whole.step == 6  # type: ignore[method-assign]
    whole.run()
    resumed, _ = make(**fields)
    resumed.step = load_checkpoint(tmp_path / "6", resumed.tuning, resumed.optimizer).step
    resumed.run()
    for name, tensor in _result(whole).items():
        assert torch.equal(tensor, _result(resumed)[name]), name


def test_selection_may_look_at_more_batches_than_a_step_has(make: Make) -> None:
    step, _ = make(micro_batch_size=8, gradient_accumulation=2, max_steps=1)
    longer, _ = make(micro_batch_size=8, gradient_accumulation=1, selection_micro_steps=2, max_steps=1)
    step.run()
    longer.run()
    for name, tensor in _result(step).items():
        assert not name.endswith("indices") or torch.equal(tensor, _result(longer)[name]), name


@pytest.mark.parametrize("method", ["sift", "full"])
def test_the_loss_in_chunks_trains_the_same(make: Make, method: str) -> None:
    fields = {"method": method, "targets": "all", "max_steps": 3, "micro_batch_size": 4, "gradient_accumulation": 2}
    plain, _ = make(**fields)
    chunked, events = make(**fields, chunked_loss=True)
    plain.run()
    chunked.run()
    assert chunked.chunks is not None
    assert not any(isinstance(event, Warned) for event in events)
    for name, tensor in _result(plain).items():
        torch.testing.assert_close(_result(chunked)[name], tensor, rtol=1e-9, atol=1e-9)


def test_events_come_in_order_and_loss_falls(make: Make) -> None:
    trainer, events = make(micro_batch_size=8, gradient_accumulation=1, max_steps=30, probe_interval=10)
    assert trainer.run()
    steps = [event for event in events if isinstance(event, Stepped)]
    assert isinstance(events[0], Selected)
    assert [event.step for event in steps] == list(range(1, 31))
    assert steps[-1].loss < steps[0].loss - 0.3
    assert [event.step for event in events if isinstance(event, Probed)] == [2, 10, 20, 30]


def test_loss_that_is_not_a_number_names_the_remedy(make: Make) -> None:
    trainer, _ = make(micro_batch_size=8, gradient_accumulation=1)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"became nan after step 0.*learning_rate \(now 0.005\)"):
        trainer.run()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_rises_to_its_peak_and_falls_towards_zero(schedule: str) -> None:
    spec = RunSpec(model="m", learning_rate=0.1, warmup_fraction=0.1, lr_schedule=schedule)
    rates = [learning_rate_at(step, 100, spec) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[9] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.002
