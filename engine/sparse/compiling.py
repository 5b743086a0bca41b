"""A function of tensors, of which torch.compile makes a few kernels where there is a compiler."""

import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

_LOG = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function compiled, at its first use; as it stands where that fails, and the log says so once.

    On a GPU each operation over a tensor is a kernel of its own, which reads and writes all of it; compiled, what there
    is of an entry is read and written once. The function must change none of its arguments.
    """

    def __init__(self, function: Callable[P, R], work: str, **options: Any) -> None:
        """Compile nothing yet.

        Args:
            function: of tensors and what is the same in every call.
            work: what it does, for the log.
            options: of `torch.compile`.
        """
        self._function, self._work, self._options = function, work, options
        self._run: Callable[P, R] | None = None

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        """Return what the function gives."""
        if self._run is None:
            self._run = torch.compile(self._function, **self._options)
        try:
            return self._run(*arguments, **named)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the compiler, most likely; what else fails will do so again
            _LOG.warning("%s is not compiled: %s", self._work, " ".join(str(error).split("\n")[:2]))
            self._run = self._function
            return self._function(*arguments, **named)
