"""Error class -> the words shown. Tracebacks go to the log, never to the screen."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import gradio as gr

from engine import errors
from engine.spec import RunSpec, about
from sparse_ui.fields import word_of
from sparse_ui.form import UnfinishedError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("sparse_ui")

TITLES: dict[type[errors.EngineError], str] = {
    errors.InvalidSpecError: "The form needs a change",
    errors.HubUnreachableError: "The Hub is out of reach",
    errors.ModelError: "The base model cannot be used",
    errors.DatasetError: "The dataset cannot be used",
    errors.BudgetError: "The run does not fit",
    errors.DeviceError: "The device is not there",
    errors.TargetsError: "Nothing to train",
    errors.DeltaError: "The result cannot be read",
    errors.TrainingError: "The training broke off",
    errors.RunError: "The run cannot do that",
    errors.WorkerError: "The worker ended",
}

# The name of a field as the engine's sentences have it, with or without a value, not inside a path or quotes.
_FIELD = re.compile(
    rf"(?<![\w'\"`/.-])({'|'.join(sorted(RunSpec.model_fields, key=len, reverse=True))})"
    r"(?:=(\{[^}]*\}|[\w:+-]+(?:\.\d+)?))?(?![\w'\"`/=-]|\.\w)"
)
_SENTENCE_ENDS = (".", "?", "!")


@dataclass(frozen=True)
class Message:
    """What a person is shown: a short title and one or more sentences; `kind` is that of their callout."""

    title: str
    sentences: tuple[str, ...]
    kind: str = ""

    @property
    def text(self) -> str:
        """All sentences in a row."""
        return " ".join(self.sentences)


def explain(error: Exception, doing: str) -> Message:
    """Return the words for an error.

    An error that is not meant for people becomes one sentence, and its traceback goes to the log.

    Args:
        error: what was raised.
        doing: what the app was at, to complete "Something went wrong in ...".
    """
    if isinstance(error, UnfinishedError):
        return Message("Waits for the form", (str(error),), "note")
    if isinstance(error, errors.InvalidSpecError):
        return Message(TITLES[errors.InvalidSpecError], tuple(with_labels(item.message) for item in error.problems))
    if isinstance(error, errors.EngineError):
        title = next((TITLES[cls] for cls in type(error).__mro__ if cls in TITLES), "That did not work")
        return Message(title, (with_labels(str(error)),))
    log.error("Unexpected error in %s", doing, exc_info=error)
    return Message("Unexpected error", (f"Something went wrong in {doing}; the log has the details.",))


def with_labels(text: str) -> str:
    """Return what the engine said with the labels of the form where it names fields: `Set Data type = fp32.`

    Names that are also plain words are fields where a sentence begins with them, or where a value follows.
    """

    def labelled(found: re.Match[str]) -> str:
        name, value = found.groups()
        if value is not None:
            switch = {"true": "on", "false": "off"}.get(value, value.strip("{}"))
            return f"{about(name).label} = {word_of(switch)}"
        before = text[: found.start()].rstrip()
        return about(name).label if "_" in name or not before or before.endswith(_SENTENCE_ENDS) else name

    return _FIELD.sub(labelled, text)


def guarded(doing: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator for a handler without a card for its errors: they are shown in a corner of the page."""

    def decorate(handler: Callable[P, T]) -> Callable[P, T]:
        @wraps(handler)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                message = explain(error, doing)
                raise gr.Error(message.text, title=message.title, print_exception=False) from None

        return call

    return decorate
