"""What comes with the project: specs in presets/*.yaml, and the demo model and datasets in presets/demo/."""

import difflib
from pathlib import Path

from engine.errors import InvalidSpecError, SpecProblem
from engine.spec import RunSpec
from engine.spec_io import load_values, parse_spec

PRESETS = Path(__file__).resolve().parent.parent / "presets"


def bundled_models() -> dict[str, Path]:
    """Return the bundled base models: name to folder."""
    return {"demo": PRESETS / "demo" / "model"}


def bundled_datasets() -> dict[str, Path]:
    """Return the bundled datasets: `demo/<name>` to the folder that holds train.jsonl and test.jsonl."""
    return {f"demo/{path.parent.name}": path.parent for path in sorted((PRESETS / "demo").glob("*/train.jsonl"))}


def find_dataset(name: str) -> Path | None:
    """Return the file or folder that `name` means, a bundled dataset or a path; None where there is none."""
    bundled = bundled_datasets()
    if name == "demo" and bundled:
        return next(iter(bundled.values()))
    path = Path(name).expanduser()
    return bundled.get(name, path if name and path.exists() else None)


def known_config(model: str) -> Path | None:
    """Return the sizes of a Hub model that the presets name, a config.json, or None."""
    path = PRESETS / "configs" / f"{model.replace('/', '--')}.json"
    return path if path.is_file() else None


def preset_models() -> list[str]:
    """Return the Hub models that the presets name, whose sizes are bundled."""
    return [path.stem.replace("--", "/", 1) for path in sorted((PRESETS / "configs").glob("*.json"))]


def list_presets() -> dict[str, Path]:
    """Return the presets: name to YAML file."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def find_spec_file(name: str) -> Path:
    """Return the file that `name` means: a path, or the name of a preset.

    Raises:
        InvalidSpecError: neither is there.
    """
    path = Path(name)
    if path.is_file():
        return path
    presets = list_presets()
    if name in presets:
        return presets[name]
    near = " or ".join(difflib.get_close_matches(name, presets, n=3))
    meant = f"Did you mean {near}? " if near else ""
    raise InvalidSpecError(
        [
            SpecProblem(
                "", f"There is no spec file or preset {name!r}. {meant}`python -m engine presets` lists them all."
            )
        ]
    )


def load_preset(name: str) -> RunSpec:
    """Return the spec of a preset.

    Raises:
        InvalidSpecError: there is no such preset, or it is wrong.
    """
    return parse_spec(load_values(find_spec_file(name)))
