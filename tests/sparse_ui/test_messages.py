"""Errors as words."""

import logging

import pytest

from engine import errors
from engine.errors import BudgetError, EngineError, InvalidSpecError, SpecProblem
from sparse_ui.messages import TITLES, explain, with_labels


def test_every_error_class_has_a_title() -> None:
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, EngineError)]
    assert set(classes) - {EngineError} == set(TITLES)


def test_each_problem_of_a_spec_is_a_sentence_of_its_own() -> None:
    error = InvalidSpecError([SpecProblem("density", "First."), SpecProblem("epochs", "Second.")])
    assert explain(error, "the plan").sentences == ("First.", "Second.")


def test_an_error_for_people_stands_as_it_is() -> None:
    assert explain(BudgetError("Too much."), "starting").text == "Too much."


def test_an_unexpected_error_shows_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        message = explain(ZeroDivisionError("division by zero"), "the plan")
    assert message.text == "Something went wrong in the plan; the log has the details."
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "learning_rate must be in (0, 10], got -2. Try 0.0002.",
            "Learning rate must be in (0, 10], got -2. Try 0.0002.",
        ),
        ("dataset is missing: name a file of the dataset.", "Dataset is missing: name a file of the dataset."),
        ("Use optimizer=auto, or method=spiel-ag.", "Use Optimizer = auto, or Method = SpIEL-AG."),
        (
            "Lower selection_memory_gib, or set offload_states=false.",
            "Lower Selection memory, or set States in main memory = off.",
        ),
        ("Use budget_gib=0.5. period 2 is short.", "Use Memory budget = 0.5. Period 2 is short."),
        ("Name another: columns={label: a}.", "Name another: Columns = label: a."),
        ("No column 'max_steps' in /data/learning_rate/a.csv.", "No column 'max_steps' in /data/learning_rate/a.csv."),
    ],
)
def test_fields_have_the_labels_of_the_form(said: str, shown: str) -> None:
    assert with_labels(said) == shown
