"""Widgets <-> spec."""

import pytest

from engine import presets
from engine.errors import InvalidSpecError
from engine.spec import RunSpec
from sparse_ui.form import WIDGETS, UnfinishedError, fill_form, read_form


def _changed(spec: RunSpec, **values: object) -> list[object]:
    return [values.get(name, value) for name, value in zip(WIDGETS, fill_form(spec), strict=True)]


@pytest.mark.parametrize("name", presets.list_presets())
def test_every_preset_survives_the_form(name: str) -> None:
    spec = presets.load_preset(name)
    assert read_form(fill_form(spec), spec.output) == spec


def test_patterns_columns_and_empty_fields_survive_the_form() -> None:
    spec = RunSpec(
        model="org/model",
        targets=("q_proj", "model.layers.1?.*"),
        columns={"instruction": "question", "output": "answer"},
        max_grad_norm=None,
        density=0.0123,
    )
    assert read_form(fill_form(spec), spec.output) == spec


def test_all_problems_come_together() -> None:
    values = _changed(RunSpec(model="demo"), density=5, micro_batch_size=None, epochs=-1)
    with pytest.raises(InvalidSpecError) as caught:
        read_form(values, "runs")
    assert {problem.field for problem in caught.value.problems} == {"density", "micro_batch_size", "epochs"}


def test_patterns_without_words_are_waited_for_once_nothing_else_is_wrong() -> None:
    waiting = {"targets": "patterns", "target_patterns": " , "}
    with pytest.raises(UnfinishedError, match="Type under Patterns which weights to train"):
        read_form(_changed(RunSpec(model="demo"), **waiting), "runs")
    with pytest.raises(InvalidSpecError, match=r"^density must be in \(0, 1\], got 5\."):
        read_form(_changed(RunSpec(model="demo"), density=5, **waiting), "runs")


def test_malformed_columns_are_refused_with_the_value() -> None:
    with pytest.raises(InvalidSpecError, match="question answer"):
        read_form(_changed(RunSpec(model="demo"), columns="question answer"), "runs")
