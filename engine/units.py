"""Bytes, seconds and counts, and the words a person reads for them."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(num_bytes: float) -> str:
    """Return bytes in the largest binary unit that keeps at least one digit before the point: `19.8 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


def format_count(count: float) -> str:
    """Return a count in thousands, millions or billions: `69.5 M`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"


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
