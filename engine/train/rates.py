"""The learning rate of each step."""

import math

from engine.spec import RunSpec


def learning_rate_at(step: int, total_steps: int, spec: RunSpec) -> float:
    """Return the learning rate of optimizer step `step`, from 1: a linear rise, then the schedule down to zero."""
    warmup = round(spec.warmup_fraction * total_steps)
    if step <= warmup:
        return spec.learning_rate * step / warmup
    if spec.lr_schedule == "constant":
        return spec.learning_rate
    # The step after the last one would have a rate of zero.
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if spec.lr_schedule == "cosine":
        return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate * (1 - done)
