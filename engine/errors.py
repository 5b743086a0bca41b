"""What can go wrong for a person. Each message is one sentence or two: what was wrong, the value, what to do."""

from collections.abc import Sequence
from dataclasses import dataclass


class EngineError(Exception):
    """Something a person can mend. The message is shown as it stands, without a traceback."""


@dataclass(frozen=True)
class SpecProblem:
    """One wrong field of a spec: its name and a sentence with rule, value and remedy."""

    field: str
    message: str


class InvalidSpecError(EngineError):
    """One or more fields of a spec are wrong; `problems` holds all of them."""

    def __init__(self, problems: Sequence[SpecProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__(" ".join(problem.message for problem in self.problems))


class HubUnreachableError(EngineError):
    """The Hugging Face Hub did not answer, and the thing asked for is not on this computer."""


class ModelError(EngineError):
    """The base model cannot be found, read or loaded."""


class DatasetError(EngineError):
    """The dataset cannot be found or read, or yields no rows to train on."""


class BudgetError(EngineError):
    """The run does not fit its memory budget."""


class DeviceError(EngineError):
    """The device a spec names is not on this computer."""


class TargetsError(EngineError):
    """`targets` matches no weight that can be trained."""


class DeltaError(EngineError):
    """A delta cannot be read, or belongs to another base model."""


class RunError(EngineError):
    """A run cannot be found, started, resumed or deleted."""


class WorkerError(EngineError):
    """A worker process ended before its time."""


class TrainingError(EngineError):
    """Training cannot go on: the loss is not a number, or memory ran out."""
