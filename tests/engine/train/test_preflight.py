"""The step before the run: it is at the longest batch, it says what helps, and the run does not know of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.train.loop
from engine.data.batches import prepare_data
from engine.errors import BudgetError
from engine.events import Event, Preflighted, Stepped
from engine.models import load_model, load_tokenizer
from engine.planner.plan import make_plan
from engine.spec import RunSpec
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.preflight import Preflight, is_out_of_memory
from engine.train.tuning import start_tuning

CPU = torch.device("cpu")


class _NeverAsked:
    def stop_requested(self) -> bool:
        return False

    def checkpoint_requested(self) -> bool:
        return False


@pytest.fixture
def parts(model_folder: Path, dataset_folder: Path, tmp_path: Path) -> Any:
    def make(**fields: Any) -> tuple[Preflight, Trainer | None]:
        values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 3, "sequence_length": 64, "device": "cpu"}
        values |= {"micro_batch_size": 2, "gradient_accumulation": 3}
        spec = RunSpec(model=str(model_folder), dataset=str(dataset_folder), **{**values, **fields})
        tokenizer = load_tokenizer(spec)
        data = prepare_data(spec, tokenizer)
        plan = make_plan(spec, lengths=data.row_lengths)
        model = load_model(spec, CPU)
        return Preflight(spec, model, tokenizer, data, plan, tmp_path, lambda spec: start_tuning(model, spec))

    return make


def _train(parts: Preflight) -> tuple[dict[str, Tensor], list[float]]:
    """Return all weights and values after a run, and its losses."""
    tuning = start_tuning(parts.model, parts.spec)
    events: list[Event] = []
    optimizer = tuning.make_optimizer()
    meter = MemoryMeter(CPU)
    Trainer(
        parts.spec,
        parts.model,
        parts.tokenizer,
        parts.data,
        tuning,
        optimizer,
        events.append,
        _NeverAsked(),
        lambda _: None,
        meter,
    ).run()
    weights = {name: each.detach().clone() for name, each in parts.model.named_parameters()}
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    return {**weights, **tuning.state()}, losses


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sift"},
        {"method": "sift", "selection_micro_steps": 4, "dtype": "bfloat16"},
        {"method": "spiel-ag", "period": 2, "estimation_steps": 1},
        {"method": "spiel-ma", "period": 2, "estimation_steps": 1, "quantization": "nf4"},
        {"method": "lora"},
        {"method": "ia3", "chunked_loss": True},
        {"method": "ia3", "quantization": "nf4"},
        {"method": "full", "dtype": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_the_run_is_the_same_bits_with_and_without(parts: Any, fields: dict[str, Any]) -> None:
    results = []
    for tried in (False, True):
        made = parts(**fields)
        before = {name: each.detach().clone() for name, each in made.model.named_parameters()}
        torch.manual_seed(7)
        if tried:
            made.run()
            after = dict(made.model.named_parameters())
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
            assert not made.model.training
        results.append((_train(made), torch.get_rng_state()))
    ((plain, losses), generator), ((again, losses_again), generator_again) = results
    assert losses == losses_again
    assert plain.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    assert torch.equal(generator, generator_again)


def test_it_is_at_the_longest_rows_of_this_dataset(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = parts(), []
    plain = engine.train.loop.batch_loss

    def watch(model: Any, batch: Any, *rest: Any) -> Tensor:
        seen.append(tuple(batch.input_ids.shape))
        return plain(model, batch, *rest)

    monkeypatch.setattr(engine.train.loop, "batch_loss", watch)
    event = made.run()
    lengths = sorted(made.data.training.lengths, reverse=True)
    assert isinstance(event, Preflighted)
    assert (event.rows, event.length) == (2, lengths[0])
    assert seen == [(2, lengths[0]), (2, lengths[2])] or seen == [(2, lengths[0]), (2, lengths[0])]
    assert made.plan.peak_bytes < make_plan(made.spec).peak_bytes  # the rows are shorter than sequence_length


@pytest.mark.parametrize(
    ("said", "ran_out"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
            True,
        ),
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: invalid argument", False),
    ],
)
def test_memory_runs_out_beside_pytorchs_own_allocator_too(said: str, ran_out: bool) -> None:
    assert is_out_of_memory(RuntimeError(said)) == ran_out


def test_memory_that_runs_out_names_what_helps_and_the_model_stays_usable(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parts(gradient_checkpointing=False, micro_batch_size=4)
    before = {name: each.detach().clone() for name, each in made.model.named_parameters()}

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.train.loop, "batch_loss", fail)
        with pytest.raises(BudgetError, match=r"ran out in the step of 4 x \d+ tokens .* What helps: \w+"):
            made.run()
    assert all(torch.equal(each, before[name]) for name, each in made.model.named_parameters())
    _, losses = _train(made)
    assert len(losses) == 3
