"""What the training loop and checkpoints ask of a tuning, sparse or baseline, and which one a spec means."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.sparse.attach import attach
from engine.sparse.probe import GradientProbe
from engine.sparse.spiel import Spiel
from engine.spec import RunSpec
from engine.train.baselines import AdapterTuning, FullTuning


class Tuning(Protocol):
    """A model made trainable. One optimizer step: see `engine.sparse.attach.SparseTuning`.

    `probe` and `spiel` are None where a method has no use for them.
    """

    probe: GradientProbe | None
    spiel: Spiel | None

    @property
    def named_values(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters, each under a name that is the same in every session of a run."""

    @property
    def values(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of their names."""

    @property
    def num_targets(self) -> int:
        """Weights that are trained, or that have an adapter."""

    @property
    def num_active(self) -> int:
        """Trained entries."""

    @property
    def target_numel(self) -> int:
        """Entries of all targets, trained or not."""

    @property
    def selecting(self) -> bool:
        """Whether the trained entries are still to be chosen from gradients."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer that the spec names, over `values`."""

    def begin_reselection(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Let entries be dropped and grown while training, where that is the method."""

    def end_micro_step(self) -> None:
        """Say that the backward of a micro-batch is over."""

    def finite(self) -> Tensor | bool:
        """Return whether the gradients by which this step chose entries, if it did, are finite; see `Spiel`."""

    def write_back(self) -> None:
        """Put the values into the weights, after the optimizer's step."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs besides the optimizer's states, name to tensor."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, and write the values into the weights."""

    def detach(self) -> None:
        """Take everything off the model, which is the base again; a full tuning leaves its weights as they are."""

    def save_result(self, folder: Path) -> None:
        """Write what `results.apply_result` puts into the base again."""


def start_tuning(model: PreTrainedModel, spec: RunSpec, without: Collection[str] = ()) -> Tuning:
    """Make of `model` what `spec.method` trains; all else is frozen.

    Args:
        model: loaded with `spec`.
        spec: of the run.
        without: names of parameters that are never targets: the head of a classifier, see `head.HeadedTuning`.

    Raises:
        TargetsError: no weight matches `spec.targets`.
    """
    match spec.method:
        case "lora" | "ia3":
            return AdapterTuning(model, spec, without)
        case "full":
            return FullTuning(model, spec, without)
    return attach(model, spec, without=without)
