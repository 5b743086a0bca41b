"""Choosing trained entries from dense gradients before or in a step: one backward, several summed, or several passes.

Sums of dense gradients lie in main memory, 4 bytes for every entry of every target. Where that is too much the targets
are done in groups: the same micro-batches go through the model once for each group, with the same random numbers, and
the result is the same. Of several processes each holds the sums of its own micro-batches, and sends the dense gradient
of every weight to the others once a choice.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from torch import Tensor

from engine.data.batches import Batch
from engine.hardware import free_memory_bytes, selection_memory_bytes
from engine.rng import random_state_kept
from engine.sparse.attach import SparseTuning
from engine.sparse.entries import ActiveEntries
from engine.sparse.peers import ALONE, Peers
from engine.sparse.sift import groups_within
from engine.sparse.spiel_ag import SpielAG
from engine.spec_rules import selects_in

_OF_FREE = 0.75  # of the memory that is free: others need some, and a tensor in use comes on top
Backward = Callable[[Batch, int], Tensor]  # a micro-batch, the labelled tokens to divide by; the loss


def choose_entries(
    tuning: SparseTuning,
    step: int,
    batches: Sequence[Batch],
    upcoming: Iterable[Batch],
    backward: Backward,
    peers: Peers = ALONE,
) -> None:
    """Choose the entries of `step` where it is to choose any, or prepare that its own backwards do.

    Args:
        tuning: told of the step by `begin_step` of its SpIEL, where it has one.
        step: from 1.
        batches: the micro-batches of the step that this process does.
        upcoming: its micro-batches from this step on, without end.
        backward: does one; gradients that it leaves behind are thrown away.
        peers: the processes that choose together.
    """
    spec, spiel = tuning.spec, tuning.spiel
    if selects_in(step, spec):
        count = (spec.selection_micro_steps or spec.gradient_accumulation * peers.count) // peers.count
        groups = _groups(tuning, peers) if count * peers.count > 1 else [tuning.entries]
        if spec.method == "sift" and count <= spec.gradient_accumulation and len(groups) == 1:
            tuning.begin_selection(count)
            return
        chosen_from = list(islice(upcoming, count))
        for group in groups:
            tuning.begin_selection(count, keep_gradient=False, entries=group)
            _pass(tuning, chosen_from, backward, peers)
    elif isinstance(spiel, SpielAG) and spiel.begins_phase and len(batches) * peers.count > 1:
        groups = _groups(tuning, peers)
        for group in groups if len(groups) > 1 else []:
            spiel.begin_pass(group)
            _pass(tuning, batches, backward, peers)
            spiel.end_pass(last=group is groups[-1])


def _groups(tuning: SparseTuning, peers: Peers) -> list[list[ActiveEntries]]:
    """Return the groups of weights whose sums fit into main memory, the same in every process that sums there."""
    allowed = min(selection_memory_bytes(tuning.spec.selection_memory_gib), int(_OF_FREE * free_memory_bytes()))
    return groups_within(tuning.entries, peers.from_first(allowed) // peers.count)


def _pass(tuning: SparseTuning, batches: Sequence[Batch], backward: Backward, peers: Peers) -> None:
    labelled = max(1, int(peers.totals([sum(batch.labelled_tokens for batch in batches)])[0]))
    with random_state_kept(tuning.entries[0].weight.device):
        for batch in batches:
            backward(batch, labelled)
    discard_gradients(tuning.entries)


def discard_gradients(entries: Iterable[ActiveEntries]) -> None:
    """Forget the gradients of the values."""
    for entry in entries:
        entry.values.grad = None
