"""What a person asks of a run while it runs."""

from typing import Protocol


class Control(Protocol):
    """Where the wishes of a person arrive."""

    def stop_requested(self) -> bool:
        """Return whether the run is to end after the step it is in."""

    def checkpoint_requested(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""


class NeverAsked:
    """Nobody asks anything."""

    def stop_requested(self) -> bool:
        """Nobody stops it."""
        return False

    def checkpoint_requested(self) -> bool:
        """Nobody wants a checkpoint."""
        return False
