"""What the kinds of `analyse` have in common on the command line: options, the spec, the folder, the last words."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from engine import runs
from engine.analysis.report import new_folder, print_findings, write_report
from engine.analysis.results import TITLES, Findings, Kind
from engine.errors import EngineError
from engine.hardware import resolve_device
from engine.planner.shape import require_weights
from engine.presets import find_spec_file
from engine.spec import METHODS, RunSpec
from engine.spec_io import apply_overrides, load_values, parse_spec

Options = argparse.Namespace
Command = Callable[[Options], int]


def add_kind(kinds: Any, kind: Kind, command: Command) -> argparse.ArgumentParser:
    """Add a kind that writes a report; return its parser."""
    parser: argparse.ArgumentParser = kinds.add_parser(kind, help=TITLES[kind], description=f"{TITLES[kind]}.")
    parser.set_defaults(command=command, kind=kind)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new or empty folder (default: under analyses/)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def add_spec_kind(kinds: Any, kind: Kind, command: Command) -> argparse.ArgumentParser:
    """Add a kind that starts from a spec; return its parser."""
    parser = add_kind(kinds, kind, command)
    parser.add_argument("spec", nargs="?", help="YAML file or name of a preset; may be left out with --set")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field of the spec")
    return parser


def at_least(least: int, most: int = 10_000) -> Callable[[str], int]:
    """Return the reading of a whole number in [least, most]; beyond `most` no analysis would end."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text!r}")
        return int(text)

    return parse


def listed(kind: Callable[[str], Any], allowed: Sequence[str] = ()) -> Callable[[str], tuple[Any, ...]]:
    """Return the reading of a list separated by commas, each word one of `allowed` where there are any."""

    def parse(text: str) -> tuple[Any, ...]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        strange = [word for word in words if allowed and word not in allowed]
        try:
            if words and not strange:
                return tuple(dict.fromkeys(kind(word) for word in words))
        except ValueError:
            pass
        rule = f"some of {', '.join(allowed)}" if allowed else "numbers"
        raise argparse.ArgumentTypeError(f"must be {rule}, separated by commas, got {text!r}")

    return parse


def rate_of(text: str) -> tuple[str, float]:
    """Read METHOD=VALUE."""
    method, _, number = text.partition("=")
    try:
        if method in METHODS:
            return method, float(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be METHOD=VALUE, such as lora=0.001, got {text!r}")


def spec_of(options: Options) -> RunSpec:
    """Return the spec that a command names.

    Raises:
        EngineError: it is wrong, has no dataset, or a run is at work on its GPU.
    """
    values = load_values(find_spec_file(options.spec)) if options.spec else {}
    spec = parse_spec(apply_overrides(values, options.set))
    if not spec.dataset:
        raise EngineError(
            "dataset is missing: name a file, a folder, a bundled dataset such as demo/pirate, or a Hub id."
        )
    require_weights(spec.model, spec.model_revision)
    runs.require_idle(resolve_device(spec.device), spec.output)
    return spec


def gpu_held(spec: RunSpec) -> AbstractContextManager[None]:
    """Return a context that holds the GPU of `spec`, where it has one, against runs and chats.

    Raises:
        RunError: one of them has it.
    """
    device = resolve_device(spec.device)
    return nullcontext() if device.is_cpu else runs.device_held(device, spec.output)


def folder_of(options: Options, name: str) -> Path:
    """Return the folder that the analysis is written into, made anew; `name` says of what."""
    return new_folder(options.out or Path("analyses") / f"{datetime.now():%Y%m%d-%H%M%S}-{options.kind}-{name}")


def finish(
    options: Options, folder: Path, findings: Findings, result: Mapping[str, Any], asked: Mapping[str, Any]
) -> int:
    """Write and print what was found; return the exit status."""
    body = write_report(folder, options.kind, findings, result, asked)
    print_findings(findings, folder, to_stderr=options.json)
    if options.json:
        print(json.dumps(body), flush=True)
    return 0
