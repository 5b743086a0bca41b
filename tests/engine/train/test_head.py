"""Classification: a head trained dense beside every method, in fp64 where equality is claimed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.data.batches import prepare_data
from engine.data.steps import step_batches
from engine.errors import DeltaError
from engine.evaluate import batch_loss
from engine.events import Evaluated, Event, Selected
from engine.models import load_classifier, load_tokenizer
from engine.spec import RunSpec, choices
from engine.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from engine.train.head import HeadedTuning, read_head
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.results import apply_result
from engine.train.tuning import start_tuning

CPU = torch.device("cpu")
BERT = pytest.mark.parametrize("encoder_folder", ["bert"], indirect=True)
Make = Callable[..., Trainer]


@dataclass
class _Asked:
    at: int = 0
    trainer: list[Trainer] = field(default_factory=list)

    def stop_requested(self) -> bool:
        return False

    def checkpoint_requested(self) -> bool:
        return bool(self.at) and self.trainer[0].step == self.at


@pytest.fixture
def make(encoder_folder: Path, pairs_folder: Path, tmp_path: Path) -> Make:
    def make_trainer(*, double: bool = True, checkpoint_at: int = 0, **fields: Any) -> Trainer:
        values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 4, "sequence_length": 32, "probe_interval": 0}
        values |= {"period": 3, "estimation_steps": 2, "weight_decay": 0.1}
        spec = RunSpec(
            model=str(encoder_folder), task="classification", **{**values, "dataset": str(pairs_folder), **fields}
        )
        tokenizer = load_tokenizer(spec)
        data = prepare_data(spec, tokenizer)
        model, head = load_classifier(spec, CPU, data.labels.names)
        if double:
            model.double()
        tuning = HeadedTuning(start_tuning(model, spec, head), model, head, data.labels.names, spec)
        events: list[Event] = []
        control = _Asked(checkpoint_at)
        save = lambda each: save_checkpoint(tmp_path, each.tuning, each.optimizer, Progress(each.step, 0.0, 0))  # noqa: E731
        trainer = Trainer(
            spec,
            model,
            tokenizer,
            data,
            tuning,
            tuning.make_optimizer(),
            events.append,
            control,
            save,
            MemoryMeter(CPU),
        )
        control.trainer.append(trainer)
        return trainer

    return make_trainer


def _result(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tuning.state().items() if "candidates" not in name}


def _assert_equal(left: Trainer, right: Trainer) -> None:
    found = _result(right)
    for name, tensor in _result(left).items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("method", ["sift", "spiel-ag", "spiel-ma", "lora", "full"])
def test_accumulation_changes_nothing(make: Make, method: str) -> None:
    """The loss is divided by the rows of the whole step, so 8 rows at once and 8 times one are the same step."""
    whole, split = (make(method=method, micro_batch_size=rows, gradient_accumulation=8 // rows) for rows in (8, 1))
    whole.run()
    split.run()
    found = _result(split)
    for name, tensor in _result(whole).items():
        torch.testing.assert_close(tensor, found[name], atol=1e-8, rtol=0)


@BERT
@pytest.mark.parametrize("method", choices("method"))
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(make: Make, tmp_path: Path, method: str) -> None:
    fields = {"method": method, "micro_batch_size": 4, "gradient_accumulation": 2, "double": False}
    whole = make(checkpoint_at=2, **fields)
    whole.run()
    resumed = make(**fields)
    resumed.step = load_checkpoint(tmp_path / "2", resumed.tuning, resumed.optimizer).step
    resumed.run()
    _assert_equal(whole, resumed)


def test_head_has_the_gradient_of_the_whole_model(make: Make) -> None:
    """What reaches the head is what torch computes where nothing is frozen."""
    trainer = make(micro_batch_size=4, gradient_accumulation=1)
    batch = step_batches(trainer.data.training, trainer.spec, 1)[0]
    batch_loss(trainer.model, batch, 4, CPU).backward()
    assert isinstance(trainer.tuning, HeadedTuning)
    head = {name: trainer.tuning.named_values[name] for name in trainer.tuning.named_values if "layer." not in name}
    found = {name: values.grad.clone() for name, values in head.items()}
    twin, _ = load_classifier(trainer.spec, CPU, trainer.data.labels.names)
    twin.double()
    batch_loss(twin, batch, 4, CPU).backward()
    expected = dict(twin.named_parameters())
    assert found.keys() == {name for name in expected if name.startswith("classifier")}
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name].grad, atol=1e-12, rtol=0)


def test_head_and_delta_move_as_one_dense_optimizer_would_move_them(make: Make) -> None:
    """Density 1 over the attention, no decay: sparse values and head together are AdamW over the same weights."""
    settings = {"targets": "attention", "density": 1.0, "weight_decay": 0.0, "max_grad_norm": None}
    trainer = make(**settings, micro_batch_size=4, gradient_accumulation=1, lr_schedule="constant", warmup_fraction=0)
    twin, head = load_classifier(trainer.spec, CPU, trainer.data.labels.names)
    twin.double().train()
    trained = {n: p for n, p in twin.named_parameters() if n in trainer.tuning.named_values or n in head}
    optimizer = torch.optim.AdamW(trained.values(), lr=trainer.spec.learning_rate, weight_decay=0.0)
    trainer.run()
    for step in range(1, 5):
        optimizer.zero_grad()
        for batch in step_batches(trainer.data.training, trainer.spec, step):
            batch_loss(twin, batch, 4, CPU).backward()
        optimizer.step()
    weights = dict(trainer.model.named_parameters())
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-7, rtol=0)


def test_new_head_is_drawn_from_the_seed_alone(make: Make) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, other = make(seed=3), make(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = make(seed=3)
    name = next(name for name in first.tuning.named_values if name.endswith("weight") and "classifier" in name)
    weights = [dict(each.model.named_parameters())[name] for each in (first, other, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


@BERT
@pytest.mark.parametrize("method", ["sift", "lora", "ia3", "full"])
def test_saved_result_with_its_head_goes_on_and_comes_off_again(make: Make, tmp_path: Path, method: str) -> None:
    trainer = make(method=method, double=False, micro_batch_size=4, gradient_accumulation=1)
    trainer.run()
    trainer.tuning.save_result(tmp_path / "delta")
    model, _ = load_classifier(trainer.spec, CPU, trainer.data.labels.names)
    batch = step_batches(trainer.data.training, trainer.spec, 1)[0]
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    switch = apply_result(model, tmp_path / "delta")
    trainer.model.eval()
    torch.testing.assert_close(_logits(model, batch), _logits(trainer.model, batch), atol=1e-6, rtol=0)
    switch(False)
    left = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(left[name], tensor) for name, tensor in base.items())


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        inputs = {} if batch.segments is None else {"token_type_ids": batch.segments}
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits


@BERT
def test_a_result_without_its_head_says_so(make: Make, tmp_path: Path) -> None:
    trainer = make(double=False)
    trainer.run()
    trainer.tuning.save_result(tmp_path / "delta")
    assert all(tensor.dtype == torch.float32 for tensor in read_head(tmp_path / "delta").values())
    (tmp_path / "delta" / "head.safetensors").unlink()
    with pytest.raises(DeltaError, match=r"head\.safetensors' cannot be read .* Train the run again\."):
        apply_result(trainer.model, tmp_path / "delta")


@BERT
def test_a_16_bit_head_moves_by_its_fp32_masters(make: Make) -> None:
    trainer = make(double=False, dtype="bfloat16", learning_rate=1e-5, max_steps=4)
    assert isinstance(trainer.tuning, HeadedTuning)
    head = [name for name in trainer.tuning.named_values if name.startswith("classifier")]
    before = {name: trainer.tuning.named_values[name].detach().clone() for name in head}
    trainer.run()
    weights = dict(trainer.model.named_parameters())
    for name in head:
        master = trainer.tuning.named_values[name]
        assert master.dtype == torch.float32
        assert bool((master != before[name]).all()), name
        assert torch.equal(weights[name], master.bfloat16())


@BERT
@pytest.mark.parametrize(("method", "steps"), [("sift", [1]), ("spiel-ag", [1, 2]), ("spiel-ma", [1, 2])])
def test_every_choice_says_what_is_computed_of_the_dense_gradient(make: Make, method: str, steps: list[int]) -> None:
    trainer, events = make(method=method, gradient_way="sampled"), []
    trainer.emit = events.append
    trainer.run()
    chosen = [event for event in events if isinstance(event, Selected)]
    assert [event.step for event in chosen] == steps
    assert all(event.gradient_share == pytest.approx(event.density) for event in chosen)


@BERT
def test_training_learns_the_pairs(make: Make) -> None:
    trainer = make(double=False, max_steps=30, learning_rate=1e-2, micro_batch_size=16, gradient_accumulation=1)
    trainer.run()
    figures = trainer.evaluate(0, scored=True)
    assert isinstance(figures, Evaluated)
    assert figures.metrics["accuracy"] > 0.8
    assert figures.samples[0].answer.endswith("%")
    assert "|||" in figures.samples[0].question


@BERT
def test_numbers_with_a_fraction_make_a_regression(make: Make, tmp_path: Path) -> None:
    """As STS-B: one output, squared error over the rows of the step, correlations as figures."""
    rows = [{"text": "red" if place % 2 else "blue grey", "label": 0.5 + 3 * (place % 2)} for place in range(32)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"dataset": str(tmp_path / "train.jsonl"), "evaluation_fraction": 0.25, "double": False}
    trainer = make(**fields, max_steps=20, learning_rate=1e-2, micro_batch_size=8, gradient_accumulation=1)
    batch = step_batches(trainer.data.training, trainer.spec, 1)[0]
    trainer.model.eval()
    errors = (_logits(trainer.model, batch)[:, 0] - batch.labels) ** 2
    loss = batch_loss(trainer.model, batch, 16, CPU)
    torch.testing.assert_close(loss.double(), errors.sum() / 16, atol=1e-5, rtol=0)
    trainer.run()
    figures = trainer.evaluate(0, scored=True)
    assert isinstance(figures, Evaluated)
    assert list(figures.metrics) == ["pearson", "spearman"]
    assert figures.metrics["pearson"] > 0.9
