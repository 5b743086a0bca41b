"""What would make a run smaller: each remedy is found by planning the spec again with the change, cheapest first."""

from collections.abc import Callable, Iterator
from typing import Any

from engine.errors import TargetsError
from engine.hardware import Device
from engine.planner.estimate import Plan, Remedy, estimate
from engine.planner.shape import ModelShape
from engine.spec import BASELINES, SPARSE, RunSpec
from engine.spec_rules import optimizer_of

Changes = dict[str, Any]
Option = tuple[str, Changes, str]  # title, changes, cost
Outcome = tuple[str, Changes, str, Plan]  # an option, and the plan with it
Kind = Callable[[RunSpec, Device], Iterator[Option]]
MOST_HALVINGS = 3  # of length or density: less is another run
LOWEST_LENGTH = 64  # tokens; shorter rows teach little
_SAVES_AT_LEAST = 0.01  # of the peak; less is no remedy


def find_remedies(spec: RunSpec, shape: ModelShape, device: Device, plan: Plan) -> tuple[Remedy, ...]:
    """Return the changes that lower the peak of a plan that does not fit for certain, in the order of their cost.

    Each goes as far as the budget asks, or as far as it can. Where no single one is enough and several together are,
    those together come last. A plan that fits has none.
    """
    if plan.verdict == "fits":
        return ()

    singles = []
    for kind in KINDS:
        found = _first_enough(kind, spec, shape, device)
        if found and _saves(plan, found[3]):
            title, changes, cost, changed = found
            singles.append(Remedy(title, plan.peak_bytes - changed.peak_bytes, changes, cost, changed.verdict))
    if any(remedy.verdict == "fits" for remedy in singles):
        return tuple(singles)
    together = _together(spec, shape, device, plan)
    return (*singles, *([] if together is None else [together]))


def _first_enough(kind: Kind, spec: RunSpec, shape: ModelShape, device: Device) -> Outcome | None:
    """Return the first option of a kind whose plan fits, else the one with the lowest peak; None where there is none.

    What leaves nothing to train, such as the attention of a model without any, is no option.
    """
    best: Outcome | None = None
    for title, changes, cost in kind(spec, device):
        try:
            plan = estimate(spec.model_copy(update=changes), shape, device)
        except TargetsError:
            continue
        if best is None or plan.peak_bytes < best[3].peak_bytes:
            best = (title, changes, cost, plan)
        if plan.verdict == "fits":
            return best
    return best


def take_until_it_fits(
    spec: RunSpec, shape: ModelShape, device: Device, plan: Plan, helps: Callable[[Plan, Plan], bool]
) -> tuple[list[Outcome], Plan]:
    """Return the changes that make `spec` fit, or come nearest, in the order of their cost, and the plan with them.

    Those that are not needed any more with the last one are taken back, the costliest first.

    Args:
        spec: what does not fit, or not for certain.
        shape: of its model.
        device: to plan for.
        plan: of `spec`.
        helps: whether a change from the first plan to the second is worth it.
    """
    taken: list[Outcome] = []
    for kind in KINDS:
        if plan.verdict == "fits":
            break
        found = _first_enough(kind, spec.model_copy(update=merged(taken)), shape, device)
        if found is not None and helps(plan, found[3]):
            taken, plan = [*taken, found], found[3]
    for each in reversed(taken[:-1]):
        rest = [other for other in taken if other is not each]
        less = estimate(spec.model_copy(update=merged(rest)), shape, device)
        if less.verdict in (plan.verdict, "fits") and plan.verdict != "does not fit":
            taken, plan = rest, less
    return taken, plan


def merged(taken: list[Outcome]) -> Changes:
    """Return the changes of several as one; of the same field the last."""
    return {name: value for _, changes, _, _ in taken for name, value in changes.items()}


def _together(spec: RunSpec, shape: ModelShape, device: Device, plan: Plan) -> Remedy | None:
    """Return the changes that fit together as one remedy; None where all are not enough, or one is."""
    taken, found = take_until_it_fits(spec, shape, device, plan, _saves)
    if found.verdict == "does not fit" or len(taken) < 2:
        return None
    titles = [title for title, _, _, _ in taken]
    title = f"{', '.join(titles[:-1])} and {titles[-1]} together"
    costs = "; ".join(cost for _, _, cost, _ in taken)
    return Remedy(title, plan.peak_bytes - found.peak_bytes, merged(taken), costs, found.verdict)


def _saves(before: Plan, after: Plan) -> bool:
    return before.peak_bytes - after.peak_bytes >= _SAVES_AT_LEAST * before.peak_bytes


def _chunks(spec: RunSpec, device: Device) -> Iterator[Option]:
    if not spec.chunked_loss and spec.task == "causal":
        yield "compute the loss in chunks", {"chunked_loss": True}, "no cost to speak of"


def _recompute(spec: RunSpec, device: Device) -> Iterator[Option]:
    if spec.recompute == "nothing" and spec.method in SPARSE:
        lean = "make norm outputs and activation products again"
        yield lean, {"recompute": "elementwise", "recompute_blocks": None}, "next to no time"
    if spec.recompute in ("nothing", "elementwise") and not spec.gradient_checkpointing:
        less = {"recompute": "auto", "recompute_blocks": None}
        yield "recompute as little as fits", less, "each step takes up to a third longer"


def _checkpointing(spec: RunSpec, device: Device) -> Iterator[Option]:
    if not spec.gradient_checkpointing:
        yield "turn on gradient checkpointing", {"gradient_checkpointing": True}, "each step takes about a third longer"


def _micro_batch(spec: RunSpec, device: Device) -> Iterator[Option]:
    effective = spec.micro_batch_size * spec.gradient_accumulation
    for rows in range(spec.micro_batch_size - 1, 0, -1):
        if effective % rows == 0:
            changes = {"micro_batch_size": rows, "gradient_accumulation": effective // rows}
            yield f"micro-batch {rows} with accumulation {effective // rows}", changes, "steps take a little longer"


def _selection(spec: RunSpec, device: Device) -> Iterator[Option]:
    steps = spec.selection_micro_steps or spec.gradient_accumulation
    if spec.method == "sift" and steps > 1 and spec.num_processes == 1:  # several always sum in main memory
        cost = "the trained entries are chosen from fewer rows"
        yield "choose the entries from 1 micro-batch", {"selection_micro_steps": 1}, cost


def _offload(spec: RunSpec, device: Device) -> Iterator[Option]:
    if optimizer_of(spec) == "adamw" and not spec.offload_states and not device.is_cpu:
        yield "states in main memory", {"offload_states": True}, "each step also moves the states to the GPU and back"


def _eight_bit(spec: RunSpec, device: Device) -> Iterator[Option]:
    if optimizer_of(spec) == "adamw" and spec.optimizer_states == "float32":
        yield "8-bit optimizer states", {"optimizer_states": "8bit"}, "the moments of AdamW are rounded to 8 bits"
    halved = spec.quantization == "nf4" or spec.dtype == "bfloat16" or (spec.dtype == "auto" and not device.is_cpu)
    if optimizer_of(spec) == "adamw" and spec.method not in BASELINES and halved and spec.optimizer_states != "compact":
        changes = {"optimizer_states": "compact"} | ({"dtype": "bfloat16"} if spec.dtype == "auto" else {})
        cost = "the moments of AdamW are rounded to 8 bits; the update of the entries takes about twice as long"
        yield "entries and optimizer states in 12 bytes", changes, cost


def _dtype(spec: RunSpec, device: Device) -> Iterator[Option]:
    if spec.dtype == "float32" and not device.is_cpu:
        yield "base weights in bfloat16", {"dtype": "bfloat16"}, "the base weights are rounded to 3 digits"


def _inputs(spec: RunSpec, device: Device) -> Iterator[Option]:
    if spec.gradient_checkpointing and not spec.offload_activations and not device.is_cpu:
        yield (
            "what enters the blocks in main memory",
            {"offload_activations": True},
            "each step waits for it to come back",
        )


def _nf4(spec: RunSpec, device: Device) -> Iterator[Option]:
    if spec.quantization == "none" and spec.method != "full":  # full trains the weights themselves
        yield "base weights in NF4", {"quantization": "nf4"}, "the base weights are rounded to 4 bits; slower steps"


def _length(spec: RunSpec, device: Device) -> Iterator[Option]:
    for halvings in range(1, MOST_HALVINGS + 1):
        length = spec.sequence_length >> halvings
        if length < LOWEST_LENGTH:
            return
        yield f"sequence length {length:,}", {"sequence_length": length}, f"rows are cut after {length:,} tokens"


def _density(spec: RunSpec, device: Device) -> Iterator[Option]:
    cost = "fewer entries are trained"
    if spec.method in BASELINES:
        return
    for halvings in range(1, MOST_HALVINGS + 1):
        if spec.num_trainable is None:
            density = float(f"{spec.density / 2**halvings:.3g}")
            yield f"density {density:g}", {"density": density}, cost
        elif count := spec.num_trainable >> halvings:
            yield f"{count:,} trained entries", {"num_trainable": count}, cost


def _attention(spec: RunSpec, device: Device) -> Iterator[Option]:
    if spec.targets in ("linear", "all"):
        yield "train the attention weights only", {"targets": "attention"}, "the MLP weights stay as they are"


# In the order of what they cost: first time, then the result.
KINDS: tuple[Kind, ...] = (
    _chunks,
    _recompute,
    _checkpointing,
    _micro_batch,
    _offload,
    _selection,
    _eight_bit,
    _dtype,
    _inputs,
    _nf4,
    _length,
    _density,
    _attention,
)
