"""The short run that a trace does in place of a whole one: as few steps, micro-batches and rows as hold as much."""

from typing import Any

import numpy as np

from engine.data.classification import LabelledExample, LabelledExamples
from engine.data.examples import Example, Examples
from engine.data.steps import row_at
from engine.spec import SPIEL_METHODS, RunSpec

STEPS = 2
RESELECTION = 2  # steps from a choice to the next, where a run chooses anew
PLENTY_GIB = 2.0**20  # of main memory, so that entries are chosen in one pass over the micro-batches
TOKEN = 3  # that pads in no family
MICRO_STEPS = 2  # the second finds gradients of the first


def traced_spec(spec: RunSpec) -> RunSpec:
    """Return a short run that holds as much as `spec` does: two steps, micro-batches and estimation steps at most."""
    changes: dict[str, Any] = {
        "gradient_accumulation": min(spec.gradient_accumulation, MICRO_STEPS),
        "max_steps": STEPS,
        "num_processes": 1,
        "evaluation_interval": 0,
        "checkpoint_interval": 0,
        "selection_memory_gib": PLENTY_GIB,
    }
    # How entries spread over the weights, and over rows and columns, hangs on trained numbers; their number does not.
    changes.update(allocation="uniform", structure="free")
    if spec.reselection_period is not None:
        changes.update(reselection_period=RESELECTION, max_steps=RESELECTION + 1)
    if spec.selection_micro_steps is not None:
        changes["selection_micro_steps"] = min(spec.selection_micro_steps, MICRO_STEPS)
    if spec.method in SPIEL_METHODS:
        changes.update(estimation_steps=STEPS, period=STEPS)
    return spec.model_copy(update=changes)


def rows(spec: RunSpec, padded: bool) -> Examples | LabelledExamples:
    """Return the rows of all steps of a `traced_spec`, all tokens labelled.

    padded: every second that is taken is shorter by half, so that each micro-batch has its longest row.
    """
    examples, labelled = Examples(), LabelledExamples()
    count = spec.micro_batch_size * spec.gradient_accumulation * (spec.max_steps or STEPS)
    taken = {row_at(place, count, spec.seed): place for place in range(count)}
    for number in range(count):
        length = spec.sequence_length // 2 if padded and taken[number] % 2 else spec.sequence_length
        ids = np.full(length, TOKEN, np.int32)
        examples.append(Example(ids, ids))
        labelled.append(LabelledExample(ids, np.zeros(0, np.uint8), 0.0))
    return labelled if spec.task == "classification" else examples
