"""The training loop in this process: what it computes, in fp64 where equality is claimed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from engine.data.batches import PreparedData, prepare_data
from engine.errors import TrainingError
from engine.events import Event, Probed, Selected, Stepped, Warned
from engine.models import load_model, load_tokenizer
from engine.sparse.attach import SparseTuning
from engine.spec import RunSpec, choices
from engine.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from engine.train.control import NeverAsked
from engine.train.loop import Trainer, learning_rate_at
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

Make = Callable[..., tuple[Trainer, list[Event]]]


@pytest.fixture(scope="module")
def common(model_folder: Path, dataset_folder: Path) -> RunSpec:
    values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 6, "sequence_length": 64, "probe_interval": 0}
    return RunSpec(model=str(model_folder), dataset=str(dataset_folder), **values)


@pytest.fixture(scope="module")
def prepared(common: RunSpec) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """The tokenizer and the rows, which no test changes and no field that is tried here means."""
    tokenizer = load_tokenizer(common)
    return tokenizer, prepare_data(common, tokenizer)


@pytest.fixture
def make(common: RunSpec, prepared: tuple[PreTrainedTokenizerBase, PreparedData]) -> Make:
    def make_trainer(**fields: Any) -> tuple[Trainer, list[Event]]:
        spec = RunSpec(**{**common.model_dump(exclude_unset=True), **fields})
        device = torch.device("cpu")
        model = load_model(spec, device)
        model = model if spec.dtype == "bfloat16" else model.double()
        tuning = start_tuning(model, spec)
        events: list[Event] = []
        trainer = Trainer(
            spec,
            model,
            *prepared,
            tuning,
            tuning.make_optimizer(),
            events.append,
            NeverAsked(),
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
    _assert_resumes(make, tmp_path, method=method, gradient_accumulation=accumulation)


@pytest.mark.parametrize("optimizer", [name for name in choices("optimizer") if name not in ("auto", "adamw")])
def test_resumed_run_equals_the_unbroken_one_with_every_optimizer(make: Make, tmp_path: Path, optimizer: str) -> None:
    _assert_resumes(make, tmp_path, method="random", optimizer=optimizer)


@pytest.mark.parametrize("method", ["sift", "spiel-ag", "lora", "full"])
def test_resumed_run_equals_the_unbroken_one_with_8_bit_states_in_main_memory(
    make: Make, tmp_path: Path, method: str
) -> None:
    fields = {"method": method, "density": 0.6, "lora_rank": 64, "targets": ("up_proj",)}
    _assert_resumes(make, tmp_path, optimizer_states="8bit", offload_states=True, **fields)
    held = load_file(tmp_path / "6" / "values.safetensors")
    assert {tensor.dtype for name, tensor in held.items() if name.endswith("exp_avg")} == {torch.uint8}


@pytest.mark.parametrize("method", ["sift", "random", "spiel-ag"])
def test_resumed_run_equals_the_unbroken_one_with_compact_entries(make: Make, tmp_path: Path, method: str) -> None:
    fields = {"method": method, "density": 0.6, "dtype": "bfloat16", "max_grad_norm": 0.5}
    _assert_resumes(make, tmp_path, optimizer_states="compact", **fields)
    held = load_file(tmp_path / "6" / "values.safetensors")
    assert torch.uint8 in {tensor.dtype for name, tensor in held.items() if name.endswith("exp_avg")}


@pytest.mark.parametrize("reselection_period", [None, 4])
def test_resumed_run_equals_the_unbroken_one_where_compact_entries_are_chosen_anew(
    make: Make, tmp_path: Path, reselection_period: int | None
) -> None:
    fields = {"reselection_period": reselection_period, "allocation": "global", "dtype": "bfloat16"}
    _assert_resumes(make, tmp_path, optimizer_states="compact", **fields)


def _assert_resumes(make: Make, tmp_path: Path, **fields: Any) -> None:
    settings = {"period": 4, "estimation_steps": 3, "max_steps": 12, "micro_batch_size": 2, "gradient_accumulation": 1}
    fields = {**settings, **fields}
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


CHOOSING = [
    {"method": "sift"},
    {"method": "sift", "allocation": "global"},
    {"method": "sift", "reselection_period": 2},
    {"method": "sift", "reselection_period": 2, "allocation": "global"},
    {"method": "fisher", "reselection_period": 3, "optimizer": "sm3"},
    {"method": "magnitude", "allocation": "global", "magnitude": "smallest"},
    {"method": "spiel-ag"},
    {"method": "spiel-ag", "allocation": "global"},
]
SPIEL = {"period": 3, "estimation_steps": 2}


@pytest.mark.parametrize("fields", CHOOSING, ids=str)
def test_passes_over_groups_of_weights_choose_what_one_sum_does(make: Make, fields: dict[str, Any]) -> None:
    """The memory is enough for a weight or two in fp32; values of fp64 are larger still."""
    fields = {**fields, **SPIEL, "micro_batch_size": 2, "gradient_accumulation": 2}
    whole, _ = make(**fields, selection_memory_gib=1.0)
    split, _ = make(**fields, selection_memory_gib=40_000 / 2**30)
    whole.run()
    split.run()
    for name, tensor in _result(whole).items():
        torch.testing.assert_close(tensor, _result(split)[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("fields", CHOOSING, ids=str)
def test_every_way_of_choosing_resumes_bit_for_bit(make: Make, tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {**fields, **SPIEL, "micro_batch_size": 2, "gradient_accumulation": 2, "max_steps": 9}
    whole, _ = make(**fields)
    whole.save = lambda trainer: save_checkpoint(tmp_path, trainer.tuning, trainer.optimizer, trainer.progress())
    whole.control.checkpoint_requested = lambda: whole.step == 4  # type: ignore[method-assign]
    whole.run()
    resumed, _ = make(**fields)
    resumed.go_on_from(load_checkpoint(tmp_path / "4", resumed.tuning, resumed.optimizer))
    resumed.run()
    for name, tensor in _result(whole).items():
        assert torch.equal(tensor, _result(resumed)[name]), name


def test_one_budget_over_all_weights_catches_more_of_the_gradient_with_as_many_entries(make: Make) -> None:
    caught, totals = [], []
    for allocation in ("uniform", "global"):
        trainer, _ = make(allocation=allocation, max_steps=1, micro_batch_size=8, gradient_accumulation=1)
        trainer.optimizer.step = lambda tuning=trainer.tuning: caught.append(  # type: ignore[method-assign]
            float(sum(values.grad.square().sum() for values in tuning.values))
        )
        trainer.spec = trainer.spec.model_copy(update={"max_grad_norm": None})
        trainer.run()
        totals.append(trainer.tuning.num_active)
    assert totals[0] == totals[1]
    assert caught[1] > 1.02 * caught[0]


def test_choosing_anew_keeps_what_was_learnt_and_the_delta_holds_all_of_it(make: Make) -> None:
    trainer, events = make(reselection_period=3, max_steps=9, micro_batch_size=8, gradient_accumulation=1)
    tuning = trainer.tuning
    assert isinstance(tuning, SparseTuning)
    base = {entry.name: entry.weight.detach().clone() for entry in tuning.entries}
    trainer.run()
    tuned = {entry.name: entry.weight.detach().clone() for entry in tuning.entries}
    delta = tuning.delta()
    assert [event.step for event in events if isinstance(event, Selected)] == [1, 4, 7]
    assert delta.num_active > 1.2 * tuning.num_active
    tuning.detach()
    assert all(torch.equal(entry.weight, base[entry.name]) for entry in tuning.entries)
    delta.apply(trainer.model)
    assert all(torch.equal(entry.weight, tuned[entry.name]) for entry in tuning.entries)


@pytest.mark.parametrize("method", ["sift", "fisher", "spiel-ag", "spiel-ma", "lora", "full"])
def test_scale_of_the_loss_changes_nothing_in_fp64(make: Make, method: str) -> None:
    """A power of two, so that scaling is exact; weights, seeds and accumulators would show a scale that leaks."""
    fields = {"method": method, **SPIEL, "micro_batch_size": 4, "gradient_accumulation": 2}
    plain, _ = make(**fields)
    scaled, _ = make(**fields)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain.run()
    scaled.run()
    for name, tensor in _result(plain).items():
        assert torch.equal(tensor, _result(scaled)[name]), name


@pytest.mark.parametrize(
    "fields", [{"method": "sift"}, {"method": "sift", "reselection_period": 2}, {"method": "spiel-ag"}], ids=str
)
def test_float16_backs_off_where_the_scaled_gradient_overflows(make: Make, fields: dict[str, Any]) -> None:
    """At first 2**40 overflows float16 in every backward; the run ends where one that began lower does."""
    values = {**SPIEL, "dtype": "float16", "micro_batch_size": 8, "gradient_accumulation": 1, **fields}
    trainers = []
    for scale in (2.0**40, 2.0**10):
        trainer, events = make(**values)
        trainer.model.half()
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.run()
        trainers.append(trainer)
        losses = [event.loss for event in events if isinstance(event, Stepped)]
        assert losses[-1] < losses[0]
    assert trainers[0].scaler.get_scale() < 2.0**30
    high, low = (_result(trainer) for trainer in trainers)
    shared = [torch.isin(high[name], low[name]).float().mean() for name in high if name.endswith(".indices")]
    assert min(shared) > 0.9


def test_loss_scale_is_kept_in_the_checkpoint(make: Make, tmp_path: Path) -> None:
    fields = {"dtype": "float16", "micro_batch_size": 8, "gradient_accumulation": 1, "max_steps": 3}
    trainer, _ = make(**fields)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    trainer.run()
    save_checkpoint(tmp_path, trainer.tuning, trainer.optimizer, trainer.progress())
    resumed, _ = make(**fields)
    resumed.go_on_from(load_checkpoint(tmp_path / "3", resumed.tuning, resumed.optimizer))
    assert resumed.progress() == trainer.progress()
    assert resumed.progress().loss_scale == 2.0**13
    assert resumed.progress().steps_at_scale == 3


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


@pytest.mark.parametrize(("level", "warnings"), [("mlp", 1), ("elementwise", 1), ("blocks", 0), ("nothing", 0)])
def test_a_family_whose_blocks_cannot_keep_less_is_warned_of(
    make: Make, model_folder: Path, tmp_path: Path, level: str, warnings: int
) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=256, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for model, said in ((tmp_path, warnings), (model_folder, 0)):
        _, events = make(model=str(model), recompute=level)
        assert sum(isinstance(event, Warned) for event in events) == said


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
