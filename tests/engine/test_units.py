"""Numbers as a person reads them."""

import pytest

from engine.units import GIB, KIB, MIB, format_bytes, format_count


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (MIB - 60, "1023.9 KiB"),
        (MIB - 10, "1.0 MiB"),
        (1000 * MIB, "1000.0 MiB"),
        (GIB - 1, "1.0 GiB"),
        (-19.84 * GIB, "-19.8 GiB"),
        (2000 * GIB, "2000.0 GiB"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_that_leaves_a_digit(num_bytes: float, words: str) -> None:
    assert format_bytes(num_bytes) == words


@pytest.mark.parametrize(
    ("count", "words"), [(999, "999"), (999.6, "1.0 K"), (999_960, "1.0 M"), (69_480_000, "69.5 M"), (7e10, "70.0 B")]
)
def test_counts_are_told_in_thousands_millions_and_billions(count: float, words: str) -> None:
    assert format_count(count) == words
