"""What traces found, kept on disk by config, the fields of a spec that matter, and library versions. Torch-free.

A trace takes a second and a process that has torch; a plan takes milliseconds. What was traced once is read from here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.hardware import Device
from engine.planner import hub_files, kept
from engine.planner.headers import Shape
from engine.planner.ledger import Figures
from engine.planner.shape import resolve_model
from engine.runs import read_json
from engine.spec import RunSpec, about

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
# Groups of fields that change nothing of what a step holds, and single fields of other groups.
_IDLE_GROUPS = frozenset(("data", "training", "evaluation", "run"))
_IDLE_FIELDS = frozenset(
    (
        *("model", "model_revision", "device", "num_processes", "budget_gib", "selection_memory_gib", "lora_alpha"),
        *("learning_rate", "lr_schedule", "warmup_fraction", "schedule", "initial_rate"),
    )
)
_USED_FIELDS = frozenset(("task", "probe_interval"))


@dataclass(frozen=True)
class Traced:
    """A trace and what the caching allocator makes of it; bytes, CUDA context not counted.

    `allocated_bytes`: the most that is given out, as `torch.cuda.max_memory_allocated` says. `reserved_bytes`: taken
    from the device where there is room. `minimum_bytes`: the least limit at which the run still succeeds. On the CPU,
    which has another allocator, all three are the peak of the figures. `tensors`: the parameters of the model's class,
    name to shape, and `spec`: what was traced, as plain data; both of a family that the closed forms do not know.
    """

    figures: Figures
    allocated_bytes: int
    reserved_bytes: int
    minimum_bytes: int
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Traced":
        """Return what `to_dict` gave."""
        tensors = {name: tuple(sizes) for name, sizes in body["tensors"].items()}
        return cls(**{**body, "figures": Figures.of(body["figures"]), "tensors": tensors})


def traced(spec: RunSpec, device: Device) -> Traced | None:
    """Return what a trace of `spec` on `device` found, or None where there was none yet.

    Raises:
        ModelError: the model cannot be found.
        HubUnreachableError: its config is on the Hub only, and the Hub does not answer.
    """
    return read_traced(trace_path(spec, device))


def why_untraced(spec: RunSpec, device: Device) -> str:
    """Return why `spec` cannot be traced on `device`, where that was tried; else nothing."""
    return str(read_json(trace_path(spec, device)).get("error", ""))


def why_refused(spec: RunSpec, device: Device) -> str:
    """Return why no run of `spec` can load its model, where a trace found that; else nothing."""
    return str(read_json(trace_path(spec, device)).get("refused", ""))


def newest_path(spec: RunSpec, device: Device) -> Path:
    """Return the file for the newest trace of the model of `spec` on a device of this kind, of an unknown family.

    Raises:
        ModelError: the model cannot be found.
        HubUnreachableError: its config is on the Hub only, and the Hub does not answer.
    """
    return _path(spec, device, {"task": spec.task})


def read_traced(path: Path) -> Traced | None:
    """Return the trace in a file, or None where there is none."""
    try:
        return Traced.of(read_json(path))
    except (KeyError, TypeError, AttributeError):
        return None


def keep(spec: RunSpec, device: Device, found: Traced) -> None:
    """Write what a trace found, for `traced`; a folder that cannot be written changes nothing."""
    kept.keep(trace_path(spec, device), found.to_dict())
    if found.tensors:
        kept.keep(newest_path(spec, device), found.to_dict())


def keep_failure(spec: RunSpec, device: Device, why: str, *, refused: bool = False) -> None:
    """Write why `spec` cannot be traced, or its model not be loaded, so that nobody tries again with this code."""
    kept.keep(trace_path(spec, device), {"refused" if refused else "error": why})


def trace_path(spec: RunSpec, device: Device) -> Path:
    """Return the file for the trace of `spec` on a device of this kind.

    Raises:
        ModelError: the model cannot be found.
        HubUnreachableError: its config is on the Hub only, and the Hub does not answer.
    """
    return _path(spec, device, _fields_that_matter(spec))


def _path(spec: RunSpec, device: Device, fields: dict[str, Any]) -> Path:
    content = {
        "config": hashlib.sha256(_config_of(spec).read_bytes()).hexdigest(),
        "spec": fields,
        "cpu": device.is_cpu,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "engine": _engine_stamp(),
    }
    return kept.kept_path("traces", content)


def _config_of(spec: RunSpec) -> Path:
    found = resolve_model(spec.model, spec.model_revision)
    return found / "config.json" if isinstance(found, Path) else hub_files.config_path(found, spec.model_revision)


def _fields_that_matter(spec: RunSpec) -> dict[str, Any]:
    values = spec.model_dump(mode="json")
    # More micro-batches than two hold as much as two, and a probe is a probe.
    values["gradient_accumulation"] = min(spec.gradient_accumulation, 2)
    values["probe_interval"] = min(spec.probe_interval, 1)
    return {
        name: value
        for name, value in values.items()
        if name in _USED_FIELDS or (about(name).group not in _IDLE_GROUPS and name not in _IDLE_FIELDS)
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=1)
def _engine_stamp() -> str:
    """Return a hash of the engine's own code, which the trace runs."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
