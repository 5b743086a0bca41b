"""The moments of a run that may be its peak: loss, backward of a block, optimizer step, selection of entries."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.planner import activations, formulas, output_layer
from engine.planner.formulas import FP32_BYTES
from engine.planner.one_budget import OneBudget
from engine.planner.steps import Moment, pass_of
from engine.planner.workload import Workload
from engine.spec import BASELINES, SPIEL_METHODS
from engine.spec_rules import entries_move

__all__ = ["Moment", "after_forward_bytes", "host_bytes", "run_moments"]


def run_moments(work: Workload) -> list[Moment]:
    """Return every moment that may be the peak."""
    e, spec = work.setting.element_bytes, work.spec
    moments = pass_of(work, "gathering").moments()
    if work.exchanged_bytes:
        moments.append(Moment("exchange of gradients", 0, work.exchanged_bytes, {}))
    if spec.method in BASELINES:
        return [*moments, Moment("optimizer step", 0, work.update_bytes, {})]
    # The gradients are dropped before the weights take the new values and entries are replaced.
    dropped = {"gradients": work.gradients_bytes}
    after = max(formulas.write_back_bytes(work.most_active, e), _replacing_bytes(work))
    steps = [Moment("optimizer step", 0, work.update_bytes, {}), Moment("optimizer step", 0, after, dropped)]
    return [*moments, *steps, *selection_moments(work)]


def _replacing_bytes(work: Workload) -> int:
    """Return what SpIEL's replacement takes: among all entries as one, or weight by weight in their order."""
    if work.spec.method not in SPIEL_METHODS:
        return 0
    if work.spec.method == "spiel-ag":
        if work.together:
            return formulas.replacing_together_bytes(work.num_active, work.most_active)
        return formulas.replacing_bytes(max(work.sizes))
    growing = zip(work.sizes, (0, *work.sizes), strict=False)
    return max(formulas.growing_bytes(size, left) for size, left in growing)


def after_forward_bytes(work: Workload) -> int:
    """Return what blocks, last norm and loss keep at the end of a forward; the logits are dropped."""
    kept = pass_of(work, "gathering")
    if work.chunks_loss:
        loss = output_layer.chunked_saved_bytes(work.shape, work.setting, work.trains_head)
    else:
        loss = activations.loss_saved_bytes(work.shape.vocabulary, work.predictions)
    return kept.blocks_saved + kept.head_saved + loss


def selection_moments(work: Workload) -> list[Moment]:
    """Return the moments in which entries are chosen: before or in the first step, or in SpIEL's estimation phases."""
    (numel, count), e, method = work.largest, work.setting.element_bytes, work.spec.method
    # Before the first step there are no states.
    unseeded = {"optimizer_states": (0 if work.offloaded else work.states_bytes) + work.head_states_bytes}
    if method in ("random", "spiel-ma"):
        drawn = formulas.draw_bytes(numel, count) if work.on_cpu else 0
        return [Moment("selection", 0, drawn, {} if method == "spiel-ma" else unseeded)]
    if work.together:
        return _one_choice(work, unseeded)
    if method == "magnitude":
        return [Moment("selection", 0, 2 * e * numel + formulas.topk_bytes(numel, count, e), unseeded)]
    if work.selection_micro_steps == 1:
        steps = pass_of(work, "choosing").moments()
        if method == "spiel-ag":
            steps = [_without(moment, {"gradients": work.candidate_sums_bytes}) for moment in steps]
    else:
        # The sums lie in main memory; each tensor's is brought to the device when its entries are chosen.
        steps = [_chosen_by_sums(work), *_summing(work)]
    # Those who choose again do so beside the states; the others once, before there are any.
    without = {} if work.chooses_anew else unseeded
    return [_without(step, without) for step in steps]


def _summing(work: Workload) -> list[Moment]:
    """The backwards whose dense gradients, or their squares, are summed up in main memory."""
    squared = work.spec.method == "fisher"
    if not (work.on_cpu or squared):  # no more than where entries are gathered
        return []
    summing = pass_of(work, "summing" if squared else "gathering")
    steps, missing = summing.moments(work.summed_bytes if work.on_cpu else 0), _unchosen(work, [*work.numels])
    return [replace(step, without={**missing, **step.without}) for step in steps]


def _one_choice(work: Workload, unseeded: Mapping[str, int]) -> list[Moment]:
    """The choice over all targets: while they come, and in the end, before any entries are placed."""
    (numel, _), e, method = work.largest, work.setting.element_bytes, work.spec.method
    summed = method != "magnitude" and work.selection_micro_steps > 1
    wide = FP32_BYTES if summed or method == "fisher" else e
    budget = OneBudget(work.num_active, sum(work.numels.values()), wide)
    if summed:
        # A sum goes when its weight was taken in.
        sums = max(0, work.summed_bytes - FP32_BYTES * budget.kept) if work.on_cpu else FP32_BYTES * numel
        coming = _summing(work)
    elif method == "magnitude":
        sums, coming = e * numel, []
    else:
        sums, coming = 0, pass_of(work, "choosing").moments(choice=budget.kept_bytes)
    missing = _unchosen(work, [*work.numels])
    taken = [budget.finishing_bytes]
    if summed or method == "magnitude":
        taken.append(sums + budget.kept_bytes + budget.adding_bytes(numel))
    chosen = [Moment("selection", 0, each, missing) for each in taken]
    without = {} if work.chooses_anew and method != "magnitude" else unseeded
    return [_without(step, without) for step in (*coming, *chosen)]


def _without(step: Moment, parts: Mapping[str, int]) -> Moment:
    """Return a moment of a selection, without these bytes of the resident parts as well."""
    missing = {name: step.without.get(name, 0) + parts.get(name, 0) for name in {**step.without, **parts}}
    return Moment("selection", step.saved, step.transient, missing)


def _chosen_by_sums(work: Workload) -> Moment:
    """The choice in the last of the largest targets, beside what those before it left."""
    (numel, count), spec = work.largest, work.spec
    missing = _unchosen(work, work.yet_to_choose)
    if spec.method == "spiel-ag":
        left = formulas.chosen_candidates_bytes(count)
    else:
        kept = spec.method == "sift" and work.selection_micro_steps <= spec.gradient_accumulation * spec.num_processes
        left = formulas.gradients_bytes(count) if kept else 0
        if not kept:
            missing["gradients"] = formulas.gradients_bytes(work.num_active)
        if spec.reselection_period is None:
            left += work.placed_bytes(work.targets.largest)
    top = formulas.choosing_bytes(numel, count, FP32_BYTES, squared=False, left=left)
    top += work.summed_bytes if work.on_cpu else FP32_BYTES * numel
    return Moment("selection", 0, top, missing)


def _unchosen(work: Workload, names: Sequence[str]) -> dict[str, int]:
    """Return what the entries of some targets do not take yet before they are chosen by sums, part to bytes."""
    rest = sum(work.active[name] for name in names)
    if work.spec.method == "spiel-ag":
        return {"gradients": formulas.chosen_candidates_bytes(rest) + work.candidate_sums_bytes}
    missing = {"gradients": formulas.gradients_bytes(rest)}
    if work.spec.reselection_period is None:  # else the entries are there from the choice before
        missing |= {"indices": work.indices_of(names), "values": work.kept_bytes(rest)}
    return missing


def host_bytes(work: Workload) -> int:
    """Return the main memory that a GPU run needs: to choose its entries, what that leaves, for states and inputs.

    Where entries move they are chosen beside the states; else before there are any. Each process needs its own.
    """
    states, selecting = work.host_states_bytes, _selection_host_bytes(work)
    blocks = sum(not kept.inside for kept in work.kept[work.lowest :])
    inputs = blocks * formulas.pinned_bytes(work.block_input_bytes)
    each = states + selecting if entries_move(work.spec) else max(states, selecting)
    return (each + (inputs if work.offloads_inputs else 0)) * work.spec.num_processes


def _selection_host_bytes(work: Workload) -> int:
    (numel, count), method = work.largest, work.spec.method
    settled = 0 if work.quantised else work.settled_bytes
    if method in BASELINES:
        return 0
    if method in ("random", "spiel-ma"):
        return formulas.draw_bytes(numel, count)
    if method == "magnitude" or work.selection_micro_steps == 1:
        return settled
    return work.summed_bytes + FP32_BYTES * numel + settled
