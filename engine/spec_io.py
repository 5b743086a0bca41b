"""RunSpec in and out: YAML files, `name=value` overrides, and one sentence for each thing that is wrong."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.errors import InvalidSpecError, SpecProblem
from engine.spec import RunSpec, about, choices
from engine.spec_rules import rule_problems

# YAML 1.1 reads 1e-4 as a string; a person means the number.
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def parse_spec(values: Mapping[str, Any]) -> RunSpec:
    """Return the spec that `values` describe; missing fields take their defaults.

    Raises:
        InvalidSpecError: with every problem, each a sentence with rule, value and remedy.
    """
    values = {name: _as_meant(name, value) for name, value in values.items()}
    try:
        spec, problems = RunSpec(**values), []
    except ValidationError as error:
        # A field of several types reports each of them: one sentence a field is enough.
        found = {_field_of(detail): _problem(detail) for detail in reversed(error.errors())}
        problems = [*reversed(found.values())]
        kept = {name: value for name, value in values.items() if name in RunSpec.model_fields and name not in found}
        spec = RunSpec(**{"model": "-", **kept})  # what is right still has to go together
    wrong = {problem.field for problem in problems}
    problems += [SpecProblem(name, text) for name, text in rule_problems(spec).items() if name not in wrong]
    if problems:
        raise InvalidSpecError(problems)
    return spec


def _as_meant(name: str, value: Any) -> Any:
    """Return a YAML scalar as its field means it: `model=2024` is a name, and `density=true` is no number."""
    if name not in RunSpec.model_fields or isinstance(value, str | list | tuple | dict) or value is None:
        return value
    annotation = RunSpec.model_fields[name].annotation
    if isinstance(value, bool) and annotation is not bool:
        return str(value).lower()
    return str(value) if str in (annotation, *get_args(annotation)) else value


def _field_of(detail: ErrorDetails) -> str:
    return str(detail["loc"][0]) if detail["loc"] else ""


def _problem(detail: ErrorDetails) -> SpecProblem:
    name, value = _field_of(detail), detail["input"]
    if detail["type"] == "extra_forbidden":
        return SpecProblem(name, f"There is no field {name!r}. {_nearest(name)}")
    if detail["type"] == "missing":
        return SpecProblem(name, f"{name} is missing. {about(name).help}")
    remedy = _REMEDIES[name](value) if name in _REMEDIES else about(name).remedy
    return SpecProblem(
        name,
        f"{name} must be {_rule(name, detail)}, got {'nothing' if value is None else repr(value)}. {remedy}".rstrip(),
    )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, list(RunSpec.model_fields), n=1)
    return f"Did you mean {near[0]}?" if near else "`python -m engine fields` lists them all."


def _rule(name: str, detail: ErrorDetails) -> str:
    if about(name).rule:
        return about(name).rule
    if words := choices(name):
        return f"one of {', '.join(words)}"
    bounds = {key: value for item in RunSpec.model_fields[name].metadata for key, value in _bounds(item)}
    kind = "a whole number" if "int" in str(RunSpec.model_fields[name].annotation) else "a number"
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        left, right = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        return f"{kind if kind != 'a number' else ''} in {left}{_plain(low)}, {_plain(high)}{right}".strip()
    if low is not None:
        return f"{kind} {'of at least' if 'ge' in bounds else 'above'} {_plain(low)}"
    return str(detail["msg"]).removeprefix("Input should be ").removeprefix("a valid ")


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _bounds(item: object) -> list[tuple[str, float]]:
    return [(key, getattr(item, key)) for key in ("ge", "gt", "le", "lt") if getattr(item, key, None) is not None]


def _percent_remedy(value: object) -> str:
    if isinstance(value, (int, float)) and 1 < value <= 100:
        return f"For {value:g} percent write {value / 100:g}."
    return "For 5 percent write 0.05."


_REMEDIES: dict[str, Callable[[object], str]] = {"density": _percent_remedy}


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with `name=value` overrides put in; each value is read as YAML.

    Raises:
        InvalidSpecError: an override has no `=`, or its value is not YAML.
    """
    merged, problems = dict(values), []
    for override in overrides:
        name, sign, text = override.partition("=")
        try:
            if not sign:
                raise yaml.YAMLError
            merged[name.strip()] = _read_scalar(text)
        except yaml.YAMLError:
            problems.append(
                SpecProblem(name, f"--set takes name=value, got {override!r}. For example --set density=0.01.")
            )
    if problems:
        raise InvalidSpecError(problems)
    return merged


def _read_scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except ValueError:  # it looks like a date and is none: a name
        return text
    return _as_number(value)


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def load_values(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML file.

    Raises:
        InvalidSpecError: the file is missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise InvalidSpecError(
            [SpecProblem("", f"There is no spec file {str(path)!r}. Presets lie in presets/.")]
        ) from None
    except UnicodeDecodeError:
        raise InvalidSpecError([SpecProblem("", f"{str(path)!r} is no text in UTF-8, so no spec.")]) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise InvalidSpecError([SpecProblem("", f"{str(path)!r} is not valid YAML{where}.")]) from None
    if not isinstance(values, dict):
        raise InvalidSpecError(
            [SpecProblem("", f"{str(path)!r} must hold `field: value` lines, got {type(values).__name__}.")]
        )
    return {str(name): _as_number(value) for name, value in values.items()}


def dump_spec(spec: RunSpec) -> str:
    """Return the spec as YAML with every field, in the order of the schema."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
