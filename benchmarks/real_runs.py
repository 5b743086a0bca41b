"""Short real runs of the training loop over random weights and random rows, without files."""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from engine.data.examples import Example, Examples
from engine.planner.trace import make_trainer
from engine.spec import RunSpec
from engine.train.tuning import start_tuning


def random_rows(spec: RunSpec, vocabulary: int) -> Examples:
    """Return the rows of all steps of a run, as long as `sequence_length` allows, all tokens labelled."""
    assert spec.max_steps is not None, "a short run says how many steps it has"
    rng = np.random.default_rng(spec.seed)
    count = spec.max_steps * spec.micro_batch_size * spec.gradient_accumulation
    drawn = rng.integers(0, vocabulary, (count, spec.sequence_length), dtype=np.int32)
    return Examples(Example(ids, ids) for ids in drawn)


def train(model: PreTrainedModel, spec: RunSpec) -> None:
    """Train `model` as a run of `spec` does."""
    tuning = start_tuning(model, spec)
    config: Any = model.config.get_text_config()
    make_trainer(model, spec, tuning, tuning.make_optimizer(), random_rows(spec, config.vocab_size)).run()
