"""What was measured on a device: what the process takes before a tensor, workspaces, rates.

A probe (`python -m engine calibrate`) measures all of it; each finished run adds its rate. The file, beside the user's
caches, is one JSON object: a device and library versions -> what was measured there, so that another card or build
starts anew.
"""

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.hardware import Device

KEPT_RATES = 24  # newest measurements of speed that stay
_FOLDER = "SPARSE_TUNING_CACHE"  # in the environment: another folder than the user's own
_WIDER = 4.0  # a rate is used for models up to so many times wider or narrower than the one it was measured on


@dataclass(frozen=True)
class Rate:
    """A speed: `flops_per_s` operations a second, counted as `duration.step_flops` counts them.

    `hidden`: width of the model; narrow models reach less.
    """

    dtype: str
    hidden: int
    flops_per_s: float


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device with one set of libraries; bytes are None before a probe."""

    context_bytes: int | None = None
    workspace_bytes: int | None = None
    rates: tuple[Rate, ...] = ()


def calibration_path() -> Path:
    """Return the file that holds what was measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(_FOLDER) or Path(cache) / "sparse-tuning") / "calibration.json"


def read_calibration(device: Device) -> Calibration:
    """Return what was measured on `device` with the libraries that are installed; nothing where nothing was."""
    path = calibration_path()
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return Calibration()
    return _read_all(path, stamp).get(_key(device), Calibration())


@lru_cache(maxsize=4)
def _read_all(path: Path, _stamp: int) -> dict[str, Calibration]:
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: Calibration(each["context_bytes"], each["workspace_bytes"], tuple(Rate(**r) for r in each["rates"]))
            for key, each in body.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # measured again sooner or later


@lru_cache(maxsize=1)
def _versions() -> str:
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _key(device: Device) -> str:
    return f"{device.label}, {_versions()}"


def store_bytes(device: Device, context_bytes: int, workspace_bytes: int) -> None:
    """Keep what a probe measured on `device`."""
    _store(device, replace(read_calibration(device), context_bytes=context_bytes, workspace_bytes=workspace_bytes))


def store_rate(device: Device, rate: Rate) -> None:
    """Keep a speed measured on `device` beside the others; the oldest goes."""
    known = read_calibration(device)
    _store(device, replace(known, rates=(*known.rates, rate)[-KEPT_RATES:]))


def _store(device: Device, measured: Calibration) -> None:
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read_all(path, path.stat().st_mtime_ns) if path.exists() else {}
    body = {key: asdict(each) for key, each in (known | {_key(device): measured}).items()}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(body, indent=1), encoding="utf-8")
    partial.replace(path)


def calibrated(device: Device) -> Device:
    """Return `device` with the bytes that a probe measured on it."""
    known = read_calibration(device)
    return replace(device, context_bytes=known.context_bytes, workspace_bytes=known.workspace_bytes)


def rate_for(device: Device, dtype: str, hidden: int) -> float | None:
    """Return operations a second on `device` for a model of this width: of what was measured, the nearest in width.

    The median of those equally near. None where nothing of this data type and about this width was measured.
    """
    rates = [rate for rate in read_calibration(device).rates if rate.dtype == dtype]
    if not rates:
        return None
    distances = [abs(math.log(rate.hidden / hidden)) for rate in rates]
    nearest = min(distances)
    if nearest > math.log(_WIDER):
        return None
    return statistics.median(
        rate.flops_per_s for rate, distance in zip(rates, distances, strict=True) if distance <= nearest
    )
