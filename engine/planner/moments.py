"""The moments of a run that may be its peak: loss, backward of a block, optimizer step, selection of entries."""

from dataclasses import dataclass, replace

from engine.planner import activations, formulas, output_layer
from engine.planner.workload import Workload
from engine.spec import BASELINES, SPIEL_METHODS
from engine.spec_rules import entries_move

_UNSEEDED = ("optimizer_states",)  # before the first step there are none


@dataclass(frozen=True)
class Moment:
    """A moment that may be the peak: what is saved for the backward and what comes and goes, in bytes.

    `without`: resident parts that are not there at this moment: `optimizer_states`, `gradients`.
    """

    phase: str
    saved: int
    transient: int
    without: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes beyond the resident terms."""
        return self.saved + self.transient


def run_moments(work: Workload) -> list[Moment]:
    """Return every moment that may be the peak."""
    e, spec = work.setting.element_bytes, work.spec
    if spec.method in BASELINES:
        return _baseline_moments(work)
    probe = formulas.probe_bytes(work.largest[0], e) if spec.probe_interval else 0
    reading = max(formulas.gather_bytes(work.active, e), probe)
    update = max(formulas.write_back_bytes(work.active, e), work.update_bytes)
    if spec.method in SPIEL_METHODS:
        together = spec.allocation == "global"  # replaced as one, or one by one
        update = max(update, formulas.replacing_bytes(work.num_active if together else max(work.sizes)))
    return [*step_moments(work, reading), Moment("optimizer step", 0, update), *selection_moments(work)]


def _baseline_moments(work: Workload) -> list[Moment]:
    """Return the moments of a run that selects and probes nothing.

    The gradients come up block by block while activations go: where there is one backward a step, they are not there
    at its start, and at its end the lowest block's activations are alone.
    """
    moments = [*step_moments(work, 0), Moment("optimizer step", 0, work.update_bytes)]
    if work.spec.gradient_accumulation > 1:
        return moments
    begun = [replace(moment, without=("gradients",)) for moment in moments[:-1]]
    lowest = next((part for part in work.targets.parts if part.reached), None)
    if lowest is None:
        return [*begun, moments[-1]]
    saved = activations.blocks_saved_bytes(work.shape, work.setting, [lowest])
    added = activations.block_backward_bytes(work.shape, work.setting, lowest, 0) + work.adapters_backward_bytes
    return [*begun, _block_moment(saved, added, 0), moments[-1]]


def step_moments(work: Workload, reading: int, extra: int = 0) -> list[Moment]:
    """Return the loss and the backward of a block.

    Args:
        work: what runs.
        reading: what reads a dense gradient beside it.
        extra: what else lies in memory meanwhile.
    """
    shape, setting = work.shape, work.setting
    saved = blocks_kept_bytes(work)
    moments = _loss_moments(work, saved, reading, extra)
    reached = {part for part in work.targets.parts if part.reached}
    for part in reached:
        # The rebuilt NF4 weight is freed before the dense gradient of its layer is made.
        dense = max(work.block_dense_bytes + reading, work.rebuilt_bytes)
        added = activations.block_backward_bytes(shape, setting, part, dense) + work.adapters_backward_bytes
        moments.append(_block_moment(saved, added, extra))
    return moments


def blocks_kept_bytes(work: Workload) -> int:
    """Return what the blocks, what they share and the adapters in them keep for the backward."""
    kept = activations.blocks_saved_bytes(work.shape, work.setting, work.targets.parts)
    kept += activations.shared_saved_bytes(work.shape, work.setting)
    return kept + (0 if work.setting.checkpointing else sum(work.adapters_saved.values()))


def after_forward_bytes(work: Workload) -> int:
    """Return what blocks, last norm and loss keep at the end of a forward; the logits are dropped."""
    if work.chunks_loss:
        loss = output_layer.chunked_saved_bytes(work.shape, work.setting, work.trains_head)
    else:
        loss = activations.loss_saved_bytes(work.shape, work.setting)
    return blocks_kept_bytes(work) + head_kept_bytes(work) + loss


def head_kept_bytes(work: Workload) -> int:
    """Return what the last norm keeps for the backward, and the input of a trained output layer."""
    shape = work.shape
    if not (any(part.reached for part in work.targets.parts) or shape.embedding in work.numels):
        return 0
    norm_trained = any(name.endswith(("model.norm.weight", "ln_f.weight")) for name in work.numels)
    # In chunks the gradient of the output layer is made in the forward, and its input is not kept.
    return activations.head_saved_bytes(shape, work.setting, norm_trained, work.trains_head and not work.chunks_loss)


def _loss_moments(work: Workload, saved: int, reading: int, extra: int) -> list[Moment]:
    """Return the moments between the last block's forward and its backward.

    Args:
        work: what runs.
        saved: what the blocks keep.
        reading: what reads a dense gradient beside it.
        extra: what else lies in memory meanwhile.
    """
    shape, setting, trained = work.shape, work.setting, work.trains_head
    saved += head_kept_bytes(work)
    dense = formulas.dense_gradient_bytes(shape.vocabulary * shape.hidden, setting.element_bytes)
    if not work.chunks_loss:
        moments = [Moment("loss", saved, activations.loss_transient_bytes(shape, setting) + extra)]
        if trained:
            logits = setting.element_bytes * shape.vocabulary * setting.tokens
            moments.append(Moment("backward of the output layer", saved, logits + dense + reading + extra))
        return moments
    left = output_layer.chunked_saved_bytes(shape, setting, trained)
    forward = output_layer.chunked_forward_bytes(shape, setting, trained)
    backward = output_layer.chunked_backward_bytes(shape, setting) + (dense + reading if trained else 0)
    return [Moment("loss", saved + left, max(forward, backward) + extra)]


def _block_moment(saved: int, added: int, extra: int) -> Moment:
    # Below zero: the block has freed more than its backward made, and the saved part is smaller by that.
    return Moment("backward of one block", saved + min(added, 0), max(added, 0) + extra)


def selection_moments(work: Workload) -> list[Moment]:
    """Return the moments in which entries are chosen: before or in the first step, or in SpIEL's estimation phases."""
    (numel, count), e, method = work.largest, work.setting.element_bytes, work.spec.method
    if method in ("random", "spiel-ma"):
        drawn = formulas.draw_bytes(numel, count) if work.on_cpu else 0
        return [Moment("selection", 0, drawn, () if method == "spiel-ma" else _UNSEEDED)]
    together = formulas.global_choice_bytes(work.num_active, e) if work.spec.allocation == "global" else 0
    if method == "magnitude":
        return [Moment("selection", 0, 2 * e * numel + formulas.topk_bytes(numel, count, e) + together, _UNSEEDED)]
    squares = formulas.FP32_BYTES * numel if method == "fisher" else 0
    if work.selection_micro_steps == 1:
        steps = step_moments(work, squares + formulas.topk_bytes(numel, count, e) + together)
    else:
        # The sums lie in main memory; each tensor's is brought to the device when its entries are chosen.
        summed = work.summed_bytes
        steps = step_moments(work, squares + formulas.gather_bytes(work.active, e), summed if work.on_cpu else 0)
        top = formulas.topk_bytes(numel, count, formulas.FP32_BYTES) + together
        steps.append(Moment("selection", 0, top + (summed if work.on_cpu else formulas.FP32_BYTES * numel)))
    # Those who choose again do so beside the states; the others once, before there are any.
    again = method == "spiel-ag" or work.spec.reselection_period is not None
    without = () if again else _UNSEEDED
    return [Moment("selection", step.saved, step.transient, without) for step in steps]


def host_bytes(work: Workload) -> int:
    """Return the main memory that a GPU run needs: to choose its entries, what that leaves behind, and for states.

    Where entries move they are chosen beside the states; else before there are any.
    """
    states, selecting = work.states_bytes if work.offloaded else 0, _selection_host_bytes(work)
    return states + selecting if entries_move(work.spec) else max(states, selecting)


def _selection_host_bytes(work: Workload) -> int:
    (numel, count), method = work.largest, work.spec.method
    settled = 0 if work.quantised else work.settled_bytes
    if method in BASELINES:
        return 0
    if method in ("random", "spiel-ma"):
        return formulas.draw_bytes(numel, count)
    if method == "magnitude" or work.selection_micro_steps == 1:
        return settled
    return work.summed_bytes + formulas.FP32_BYTES * numel + settled
