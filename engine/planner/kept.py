"""What was found out once and is kept beside the user's caches, by all that decides it. Torch-free."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from engine.planner.calibration import calibration_path


def kept_path(kind: str, decides: dict[str, Any]) -> Path:
    """Return the file, in a folder of its kind, for what `decides` decides; plain JSON data."""
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return calibration_path().parent / kind / f"{digest[:32]}.json"


def read_kept(path: Path) -> dict[str, Any]:
    """Return what is kept in a file; nothing where it is not there or damaged."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def write_kept(path: Path, body: dict[str, Any]) -> None:
    """Keep `body`; a folder that cannot be written changes nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(body), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return
