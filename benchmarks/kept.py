"""What a benchmark has read so far, in a file: a command that is cut off loses nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.subjects import versions

Rows = Sequence[Mapping[str, Any]]


def keep(path: Path | None, device_type: str, rows: Rows, **settings: Any) -> None:
    """Write `rows` with the settings and versions they were taken with; without a path nothing.

    The file is replaced at once, so that it is whole whenever the command ends.
    """
    if path is None:
        return
    partial = path.with_name(f".{path.name}")
    body = {"versions": versions(device_type), **settings, "rows": rows}
    partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def kept_rows(path: Path | None, device_type: str) -> list[dict[str, Any]]:
    """Return the rows in `path`, to go on from; none where there is no file, or other versions wrote it."""
    if path is None or not path.is_file():
        return []
    body = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = body["rows"] if body["versions"] == versions(device_type) else []
    return rows


def say_versions(device_type: str) -> None:
    """Print what readings are taken with, beside the table."""
    print(
        "  ".join(f"{name} {version}" for name, version in versions(device_type).items()), file=sys.stderr, flush=True
    )
