"""The only place where the values of widgets become a RunSpec and back.

A widget carries the name of its field. Two differ: `targets` also offers `patterns`, whose words stand in
`target_patterns`; `columns` is a line of text, `instruction: question, output: answer`.
"""

from collections.abc import Sequence
from typing import Any, get_args

from engine.errors import InvalidSpecError, SpecProblem
from engine.spec import RunSpec, about
from engine.spec_io import parse_spec

PATTERNS = "patterns"
NO_PATTERNS = "Type under Patterns which weights to train: parts of their names (q_proj) or globs (model.layers.1?.*)."
# `output` is the app's own --runs folder.
WIDGETS: tuple[str, ...] = (*(name for name in RunSpec.model_fields if name != "output"), "target_patterns")
MAIN: tuple[str, ...] = (
    "model",
    "dataset",
    "method",
    *(name for name in RunSpec.model_fields if about(name).methods and not about(name).detail),
    "quantization",
    "targets",
    "target_patterns",
    "density",
    "budget_gib",
    "sequence_length",
    "micro_batch_size",
    "gradient_accumulation",
)


class UnfinishedError(InvalidSpecError):
    """Nothing is wrong yet: something is still to be typed."""


def read_form(values: Sequence[Any], output: str) -> RunSpec:
    """Return the spec that the form describes.

    Args:
        values: of the widgets, in the order of `WIDGETS`.
        output: the folder for runs.

    Raises:
        InvalidSpecError: with every problem.
        UnfinishedError: there is none, but the patterns are still to be typed.
    """
    fields = dict(zip(WIDGETS, values, strict=True))
    patterns = _words(fields.pop("target_patterns"))
    waits = fields["targets"] == PATTERNS and not patterns
    if fields["targets"] == PATTERNS:
        fields["targets"] = patterns or "all"
    fields["columns"] = _read_columns(fields["columns"])
    spec = parse_spec({name: _read(name, value) for name, value in fields.items()} | {"output": output})
    if waits:
        raise UnfinishedError([SpecProblem("targets", NO_PATTERNS)])
    return spec


def fill_form(spec: RunSpec) -> list[Any]:
    """Return the values of the widgets that describe `spec`, in the order of `WIDGETS`."""
    fields = {name: getattr(spec, name) for name in WIDGETS if name != "target_patterns"}
    fields["target_patterns"] = "" if isinstance(spec.targets, str) else ", ".join(spec.targets)
    if not isinstance(spec.targets, str):
        fields["targets"] = PATTERNS
    fields["columns"] = ", ".join(f"{role}: {column}" for role, column in spec.columns.items())
    return [("" if fields[name] is None and is_text(name) else fields[name]) for name in WIDGETS]


def is_text(name: str) -> bool:
    """Return whether a field is free text."""
    if name in ("columns", "target_patterns"):
        return True
    annotation = RunSpec.model_fields[name].annotation
    return str in (annotation, *get_args(annotation))


def own_fields(method: str) -> tuple[str, ...]:
    """Return the fields that only some methods read and that `method` does."""
    return tuple(name for name in RunSpec.model_fields if method in about(name).methods)


def label_of(name: str) -> str:
    """Return the label of a field with its unit: `Sequence length, tokens`."""
    words = about(name)
    told = words.unit.lower() in words.label.lower()
    return words.label if told else f"{words.label}, {words.unit}"


def _read(name: str, value: Any) -> Any:
    if isinstance(value, str) and is_text(name):
        value = value.strip()
        default = RunSpec.model_fields[name].default
        return None if not value and default is None else value
    return value


def _read_columns(text: str | None) -> Any:
    """Return the mapping that a line of text means, or the text itself where it means none."""
    pairs = [part.partition(":") for part in _words((text or "").strip().removeprefix("{").removesuffix("}"))]
    if any(not (sign and role.strip() and column.strip()) for role, sign, column in pairs):
        return text
    return {role.strip(): column.strip() for role, _, column in pairs}


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
