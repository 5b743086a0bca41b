"""Imports go down only, and the light floors stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# An analysis measures in a worker and speaks in the command line's process.
ANALYSIS_DATA = ("engine.analysis.look", "engine.analysis.results")
ANALYSIS_WORKER = tuple(f"engine.analysis.{name}" for name in ("gradients", "landscape", "twin", "worker"))
TRACE_WORKER = tuple(
    f"engine.planner.{name}"
    for name in ("trace", "trace_worker", "short_run", "storages", "scenario", "stand_in", "memo")
)
# From the ground up; a module may import its own floor and those below.
FLOORS: list[tuple[str, ...]] = [
    ("engine.errors", "engine.units", "engine.events", "engine.targets", "engine.metrics", *ANALYSIS_DATA),
    ("engine.spec", "engine.spec_rules", "engine.spec_io"),
    (
        "engine.hub",
        "engine.presets",
        "engine.hardware",
        "engine.planner",
        "engine.processes",
        "engine.runs",
        "engine.tracer",
    ),
    ("engine.sparse", "engine.rng"),
    ("engine.data", "engine.models", "engine.chunked_loss", "engine.evaluate", "engine.classify", "engine.peft_format"),
    ("engine.chat", "engine.export", "engine.composition", "engine.train", *ANALYSIS_WORKER, *TRACE_WORKER),
    ("engine.workers", "engine.errands"),
    ("engine.analysis",),
    ("engine.progress", "engine.plan_text", "engine.__main__"),
    ("sparse_ui",),
    ("app",),
]
# The command line and the interface read datasets for the preview; these parts of engine.data need no torch.
TORCH_FREE_DATA = (
    "engine.data.preview",
    "engine.data.sources",
    "engine.data.formats",
    "engine.data.labels",
    "engine.data.files",
)
WORKER_FLOORS = {3, 4, 5}


def _modules() -> Iterator[tuple[str, Path]]:
    for top in ("app.py", "engine", "sparse_ui"):
        path = PROJECT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            parts = file.relative_to(PROJECT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), file


def _floor(module: str) -> int | None:
    """Return the floor of the longest name that `module` begins with; None outside the project."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(fitting)[1] if fitting else None


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("module", "file"), [pair for pair in _modules() if pair[0] not in ("engine", "sparse_ui")])
def test_imports_go_down_only(module: str, file: Path) -> None:
    floor = _floor(module)
    assert floor is not None, f"{module} has no floor: add it to FLOORS"
    for imported in _imports(file):
        target = _floor(imported)
        assert target is None or target <= floor, f"{module} imports {imported}, which lies above it"
        light = floor > max(WORKER_FLOORS) and target in WORKER_FLOORS
        assert not light or imported.startswith(TORCH_FREE_DATA), f"{module} imports {imported}, which brings torch"


def test_engine_never_imports_gradio() -> None:
    for module, file in _modules():
        if module.startswith("engine"):
            assert not any(name.split(".")[0] in ("gradio", "sparse_ui") for name in _imports(file)), module


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import sparse_ui.layout", "torch"),
        ("import engine.__main__", "torch"),
        ("import engine.data.preview", "torch"),
        ("import engine.train.worker, engine.chat", "gradio"),
    ],
)
def test_importing_stays_light(statement: str, banned: str) -> None:
    program = f"import sys; {statement}; sys.exit({banned!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{statement} imports {banned}: {done.stderr}"
