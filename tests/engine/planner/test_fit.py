"""The largest that fits: no smaller than it says, and as little changed as can be."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import BudgetError
from engine.planner.cards import card_device
from engine.planner.estimate import estimate
from engine.planner.fit import (
    fit_spec,
    largest,
    largest_density,
    largest_length,
    largest_micro_batch,
    largest_model,
)
from engine.planner.shape import read_shape
from engine.spec import RunSpec

CARD = card_device("RTX 4090 24 GB")


def _spec(model: str, **fields: Any) -> RunSpec:
    return RunSpec(model=model, **{"sequence_length": 2048, "gradient_checkpointing": True, **fields})


@pytest.mark.parametrize(
    ("search", "name"), [(largest_length, "sequence_length"), (largest_micro_batch, "micro_batch_size")]
)
def test_the_largest_fits_and_one_step_more_does_not(
    config_folder: Callable[..., str], search: Callable[..., int | None], name: str
) -> None:
    spec = _spec(config_folder())
    shape = read_shape(spec.model)
    found = search(spec, shape, CARD)
    assert found is not None
    verdicts = [estimate(spec.model_copy(update={name: value}), shape, CARD).verdict for value in (found, found + 1)]
    assert verdicts[0] == "fits" != verdicts[1]


def test_rows_as_short_as_a_spec_takes_are_found(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(max_position_embeddings=20))
    assert largest_length(spec, read_shape(spec.model), CARD) == 20  # what the model was made for


def test_the_largest_density_has_three_digits_and_fits(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder())
    shape = read_shape(spec.model)
    found = largest_density(spec, shape, CARD)
    assert found == float(f"{found:.3g}")
    assert estimate(spec.model_copy(update={"density": found}), shape, CARD).verdict == "fits"
    assert estimate(spec.model_copy(update={"density": 1.02 * found}), shape, CARD).verdict != "fits"


def test_the_largest_model_is_one_that_the_presets_name() -> None:
    assert largest_model(_spec("demo", sequence_length=512), CARD) == "Qwen/Qwen3-8B"
    assert largest_model(_spec("demo", sequence_length=512, quantization="nf4"), CARD) == "Qwen/Qwen3-14B"
    assert largest_model(_spec("demo", budget_gib=0.01), CARD) is None


def test_what_fits_stays_as_it_was_asked(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder())
    fit = fit_spec(spec, read_shape(spec.model), CARD)
    assert (fit.spec, fit.changes) == (spec, ())
    assert fit.plan.verdict == "fits"


def test_a_length_that_nobody_asked_for_grows(config_folder: Callable[..., str]) -> None:
    spec = RunSpec(model=config_folder(max_position_embeddings=65_536), gradient_checkpointing=True)
    shape = read_shape(spec.model)
    fit = fit_spec(spec, shape, CARD)
    assert fit.spec.sequence_length == largest_length(fit.spec, shape, CARD) > 2048
    assert {change.field for change in fit.changes} == {"sequence_length", "chunked_loss"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gradient_checkpointing": False}, {"recompute"}),
        ({"micro_batch_size": 16, "gradient_accumulation": 2}, {"micro_batch_size", "gradient_accumulation"}),
        ({"density": 0.2}, {"quantization"}),
    ],
)
def test_as_little_is_changed_as_can_be(
    config_folder: Callable[..., str], fields: dict[str, Any], expected: set[str]
) -> None:
    spec = _spec(config_folder(), **fields)
    fit = fit_spec(spec, read_shape(spec.model), CARD)
    assert fit.plan.verdict == "fits"
    assert expected <= {change.field for change in fit.changes}
    assert fit.spec.sequence_length == 2048
    for change in fit.changes:  # none could be left out
        fewer = fit.spec.model_copy(update={change.field: change.before})
        if change.field not in ("micro_batch_size", "gradient_accumulation"):
            assert estimate(fewer, read_shape(spec.model), CARD).verdict != "fits"


def test_a_length_that_is_cut_is_cut_no_more_than_needed(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(max_position_embeddings=10**6), sequence_length=600_000, quantization="nf4")
    shape = read_shape(spec.model)
    fit = fit_spec(spec, shape, CARD)
    longer = fit.spec.model_copy(update={"sequence_length": fit.spec.sequence_length + 1})
    assert 8 < fit.spec.sequence_length < 600_000
    assert estimate(longer, shape, CARD).verdict != "fits"


def test_what_cannot_fit_says_so(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), method="full")
    with pytest.raises(BudgetError, match="Choose a smaller model, or raise budget_gib"):
        fit_spec(spec, read_shape(spec.model), CARD)


def test_fitting_takes_less_than_three_seconds(config_folder: Callable[..., str]) -> None:
    spec = _spec(config_folder(), micro_batch_size=64, density=0.2, sequence_length=100_000)
    shape = read_shape(spec.model)
    started = time.process_time()
    fit = fit_spec(spec, shape, CARD)
    for field in ("sequence_length", "micro_batch_size", "density", "model"):
        largest(field, fit.spec, shape, CARD)
    assert time.process_time() - started < 3


def test_a_classification_is_not_given_a_loss_in_chunks() -> None:
    spec = RunSpec(model="FacebookAI/roberta-large", task="classification", micro_batch_size=8)
    fit = fit_spec(spec, read_shape(spec.model, task=spec.task), card_device("RTX 3060"))
    assert fit.plan.verdict == "fits"
    assert not fit.spec.chunked_loss
