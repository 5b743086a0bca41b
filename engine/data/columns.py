"""What all formats of rows share: finding columns by name, cells as text, and rows that cannot be used."""

from collections.abc import Sequence
from typing import Any


class UnusableRowError(Exception):
    """One row yields nothing to train on. Its words are the reason under which such rows are counted."""


def named(candidates: Sequence[str], columns: Sequence[str], taken: Sequence[str | None] = ()) -> list[str]:
    """Return the columns with one of these names, whatever their case, in the order of `candidates`."""
    by_name = {column.lower(): column for column in columns if column not in taken}
    return [by_name[candidate] for candidate in candidates if candidate in by_name]


def cell_text(value: Any) -> str:
    """Return a cell as text: numbers as they print, nothing as the empty string.

    Raises:
        UnusableRowError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UnusableRowError("not text")
