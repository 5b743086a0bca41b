"""The largest that fits: of one field with the rest as it is, and of a whole spec that keeps what was asked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import BudgetError, InvalidSpecError, ModelError, TargetsError
from engine.hardware import Device
from engine.planner.estimate import Plan, estimate
from engine.planner.remedies import merged, take_until_it_fits
from engine.planner.shape import ModelShape, read_shape, require_places
from engine.presets import bundled_models, preset_models
from engine.spec import SHORTEST_LENGTH, RunSpec, about

Field = Literal["sequence_length", "micro_batch_size", "density", "model"]
LARGEST_FIELDS: tuple[Field, ...] = ("sequence_length", "micro_batch_size", "density", "model")
_LONGEST = 131_072  # tokens; where the model does not say
_MOST_ROWS = 1024
_DENSITY_DIGITS = 3  # thousandths of a power of ten: 0.0123


@dataclass(frozen=True)
class Change:
    """A field of the fitted spec that differs from what was asked; `cost` says what that costs."""

    field: str
    label: str
    before: Any
    after: Any
    cost: str


@dataclass(frozen=True)
class Fit:
    """A whole spec that fits, its plan, and how it differs from what was asked."""

    spec: RunSpec
    plan: Plan
    changes: tuple[Change, ...]


def fit_spec(spec: RunSpec, shape: ModelShape, device: Device) -> Fit:
    """Return `spec` changed until it fits, as little as can be.

    The changes are those of the remedies, taken in the order of what they cost until the plan fits; then those that are
    not needed any more are taken back, the costliest first, and lengths and densities that were halved go up again as
    far as they fit. Last, a sequence length that nobody asked for grows to the longest that fits, the loss in chunks.

    Raises:
        BudgetError: nothing makes it fit.
        InvalidSpecError: the model has no places for rows that long.
    """
    require_places(shape, spec.sequence_length)
    taken, plan = take_until_it_fits(
        spec, shape, device, estimate(spec, shape, device), lambda before, after: after.peak_bytes < before.peak_bytes
    )
    if plan.verdict == "does not fit":
        shared = spec.num_processes > 1 and device.is_cpu
        raise BudgetError(
            "No change of its settings makes this run fit. Choose a smaller model, or raise budget_gib"
            f"{', or lower num_processes, which share main memory' if shared else ''}."
        )
    fitted = spec.model_copy(update=merged(taken))
    for name in ("sequence_length", "density"):
        fitted = _raised(fitted, spec, name, shape, device)
    fitted = _grown(fitted, spec, shape, device)
    costs = {name: cost for _, changes, cost, _ in taken for name in changes}
    costs.setdefault("chunked_loss", "no cost to speak of")
    if fitted.sequence_length < spec.sequence_length:
        costs["sequence_length"] = f"rows are cut after {fitted.sequence_length:,} tokens"
    else:
        costs["sequence_length"] = "as long as fits"
    return Fit(fitted, estimate(fitted, shape, device), tuple(_changes(spec, fitted, costs)))


def _grown(fitted: RunSpec, asked: RunSpec, shape: ModelShape, device: Device) -> RunSpec:
    """Return `fitted` with the longest rows that fit, where nobody asked for a length."""
    if "sequence_length" in asked.model_fields_set:
        return fitted
    if asked.task == "causal" and "chunked_loss" not in asked.model_fields_set:  # it costs nothing to speak of
        fitted = fitted.model_copy(update={"chunked_loss": True})
    longest = largest_length(fitted, shape, device)
    return fitted.model_copy(update={"sequence_length": max(longest or 0, fitted.sequence_length)})


def _raised(fitted: RunSpec, asked: RunSpec, name: str, shape: ModelShape, device: Device) -> RunSpec:
    """Return `fitted` with a field that was lowered raised as far as it fits, never above what was asked."""
    if getattr(fitted, name) >= getattr(asked, name):
        return fitted
    search = largest_length if name == "sequence_length" else largest_density
    most = search(fitted, shape, device)
    if most is None or most <= getattr(fitted, name):
        return fitted
    return fitted.model_copy(update={name: min(most, getattr(asked, name))})


def _changes(asked: RunSpec, fitted: RunSpec, costs: dict[str, str]) -> Iterator[Change]:
    for name in RunSpec.model_fields:
        before, after = getattr(asked, name), getattr(fitted, name)
        if before != after:
            yield Change(name, about(name).label, before, after, costs[name])


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number in [low, high] that fits, where every smaller one fits too; None where none does."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fits(spec: RunSpec, shape: ModelShape, device: Device, **changes: Any) -> bool:
    return estimate(spec.model_copy(update=changes), shape, device).verdict == "fits"


def largest_length(spec: RunSpec, shape: ModelShape, device: Device) -> int | None:
    """Return the longest rows that fit with the rest as it is, in tokens, at most what the model was made for."""
    most = max(SHORTEST_LENGTH, shape.longest_row or shape.positions or _LONGEST)
    return _largest(SHORTEST_LENGTH, most, lambda tokens: _fits(spec, shape, device, sequence_length=tokens))


def largest_micro_batch(spec: RunSpec, shape: ModelShape, device: Device) -> int | None:
    """Return the most rows of one backward that fit with the rest as it is."""
    return _largest(1, _MOST_ROWS, lambda rows: _fits(spec, shape, device, micro_batch_size=rows))


def largest_density(spec: RunSpec, shape: ModelShape, device: Device) -> float | None:
    """Return the largest density that fits with the rest as it is, to three digits."""
    levels = [round(step * 10.0**power, 9) for power in (-5, -4, -3, -2, -1) for step in _mantissas()] + [1.0]
    found = _largest(
        0, len(levels) - 1, lambda place: _fits(spec, shape, device, density=levels[place], num_trainable=None)
    )
    return None if found is None else levels[found]


def _mantissas() -> list[float]:
    unit = 10 ** (_DENSITY_DIGITS - 1)
    return [number / unit for number in range(unit, 10 * unit)]


def largest_model(spec: RunSpec, device: Device) -> str | None:
    """Return the model with the most parameters that fits with the rest as it is: of those the presets name."""
    shapes = []
    for name in {*bundled_models(), *preset_models()}:
        try:
            shapes.append((read_shape(name, task=spec.task), name))
        except ModelError:
            continue
    for shape, name in sorted(shapes, key=lambda each: (-each[0].num_parameters, each[1])):
        try:
            if _fits(spec, shape, device, model=name, model_revision=None):
                return name
        except (TargetsError, InvalidSpecError):  # it has no such weights, or fewer blocks
            continue
    return None


def largest(field: Field, spec: RunSpec, shape: ModelShape, device: Device) -> Any:
    """Return the largest value of `field` that fits with the rest of `spec` as it is; None where none does."""
    match field:
        case "sequence_length":
            return largest_length(spec, shape, device)
        case "micro_batch_size":
            return largest_micro_batch(spec, shape, device)
        case "density":
            return largest_density(spec, shape, device)
        case "model":
            return largest_model(spec, device)
