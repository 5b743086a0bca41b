"""What was found out once and is kept beside the user's caches, by all that decides it. Torch-free."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.planner.calibration import calibration_path
from engine.runs import write_json


def kept_path(kind: str, decides: dict[str, Any]) -> Path:
    """Return the file, in a folder of its kind, for what `decides` decides; plain JSON data."""
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return calibration_path().parent / kind / f"{digest[:32]}.json"


def keep(path: Path, body: dict[str, Any]) -> None:
    """Write `body`, for `runs.read_json`; a folder that cannot be written changes nothing."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, body)
