"""Bytes, seconds and counts, and the words a person reads for them."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(num_bytes: float) -> str:
    """Return bytes in the largest binary unit that keeps at least one digit before the point: `19.8 GiB`."""
    return _scaled(num_bytes, 1024, (" B", " KiB", " MiB", " GiB"))


def format_count(count: float) -> str:
    """Return a count in thousands, millions or billions: `69.5 M`."""
    return _scaled(count, 1000, ("", " K", " M", " B"))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """Return a number below `step` as it is printed, but for the last unit; of the first unit without decimals."""
    decimals = 0
    for unit in units[:-1]:
        if round(abs(number), decimals) < step:
            return f"{number:.{decimals}f}{unit}"
        number, decimals = number / step, 1
    return f"{number:.1f}{units[-1]}"


def format_duration(seconds: float) -> str:
    """Return a duration with at most two units: `45 s`, `2 min 5 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {secs} s" if secs else f"{minutes} min"
    return f"{secs} s"


def format_percent(fraction: float) -> str:
    """Return a fraction as percent with at most three significant digits: `0.05` -> `5 %`."""
    return f"{100 * fraction:.3g} %"
