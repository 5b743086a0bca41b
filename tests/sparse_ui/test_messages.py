"""Errors as words."""

import logging

import pytest

from engine import errors
from engine.errors import BudgetError, EngineError, InvalidSpecError, SpecProblem
from sparse_ui.messages import TITLES, explain


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
