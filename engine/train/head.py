"""The head of a classifier, trained dense beside whatever a method trains of the base.

The numbers themselves are trained, by the optimizer and the settings of the spec, in fp32: a 16-bit head has fp32
masters, as `FullTuning` has. SM3 works on sparse entries, so beside spiel-ma the head has AdamW.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from engine.errors import DeltaError
from engine.sparse.delta import read_info
from engine.sparse.optimizers import values_optimizer
from engine.sparse.probe import GradientProbe
from engine.sparse.spiel import Spiel
from engine.spec import RunSpec
from engine.spec_rules import optimizer_of
from engine.train.baselines import move_gradient
from engine.train.tuning import Tuning

HEAD_FILE = "head.safetensors"
Switch = Callable[[bool], None]


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers that step together; groups and states are those of its parts."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Join `parts`, which share no parameter."""
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.defaults: dict[str, Any] = {}
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in parts:  # one state for all, so that a checkpoint that is put into it reaches each
            self.state.update(part.state)
            part.state = self.state

    def part_of(self, values: nn.Parameter) -> torch.optim.Optimizer:
        """Return the part that trains `values`."""
        return next(part for part in self.parts if any(values is each for each in _trained_by(part)))

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def _trained_by(part: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


class HeadedTuning:
    """A tuning of the base (`inner`) with a head that is trained dense. Counts of entries are those of the base."""

    def __init__(
        self, inner: Tuning, model: PreTrainedModel, head: Sequence[str], labels: tuple[str, ...], spec: RunSpec
    ) -> None:
        """Train the parameters of `model` that `head` names.

        Args:
            inner: at work on the same model, these parameters left out.
            model: a classifier.
            head: names of parameters.
            labels: by class number, empty for a regression.
            spec: of the run.
        """
        self.inner = inner
        self._spec = spec
        self._labels = labels
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in head}
        self._masters: dict[str, nn.Parameter] = {}
        self._first = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._hooks: list[RemovableHandle] = []
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            self._masters[name] = weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                self._masters[name] = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(move_gradient(self._masters[name])))

    @property
    def probe(self) -> GradientProbe | None:
        """What measures the gradient of the base in the next backward."""
        return self.inner.probe

    @probe.setter
    def probe(self, probe: GradientProbe | None) -> None:
        self.inner.probe = probe

    @property
    def spiel(self) -> Spiel | None:
        """What drops and grows entries of the base."""
        return self.inner.spiel

    @spiel.setter
    def spiel(self, spiel: Spiel | None) -> None:
        self.inner.spiel = spiel

    @property
    def named_values(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters of base and head by name."""
        return {**self.inner.named_values, **self._masters}

    @property
    def values(self) -> list[nn.Parameter]:
        """The trained parameters of base and head."""
        return [*self.inner.values, *self._masters.values()]

    @property
    def num_targets(self) -> int:
        """Weights of the base that are trained, or that have an adapter."""
        return self.inner.num_targets

    @property
    def num_active(self) -> int:
        """Trained entries of the base."""
        return self.inner.num_active

    @property
    def target_numel(self) -> int:
        """Entries of all targets in the base."""
        return self.inner.target_numel

    @property
    def head_numel(self) -> int:
        """Entries of the head, all of them trained."""
        return sum(master.numel() for master in self._masters.values())

    @property
    def selecting(self) -> bool:
        """Whether the trained entries of the base are still to be chosen."""
        return self.inner.selecting

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return that of the base joined with one over the head."""
        name = optimizer_of(self._spec)
        # Nothing of a head moves or needs to be small: plain fp32 states, on its device.
        changes = {"method": "full", "optimizer_states": "float32", "offload_states": False}
        spec = self._spec.model_copy(update={**changes, "optimizer": "adamw" if name == "sm3" else name})
        return JoinedOptimizer([self.inner.make_optimizer(), values_optimizer([*self._masters.values()], spec)])

    def begin_reselection(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Let entries of the base be dropped and grown, where that is the method."""
        assert isinstance(optimizer, JoinedOptimizer)
        self.inner.begin_reselection(optimizer.parts[0], total_steps)

    def end_micro_step(self) -> None:
        """Say that the backward of a micro-batch is over."""
        self.inner.end_micro_step()

    def finite(self) -> Tensor | bool:
        """Return whether the gradients by which this step chose entries of the base, if it did, are finite."""
        return self.inner.finite()

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the values into the weights, and round the masters into the head."""
        self.inner.write_back()
        for name, weight in self._weights.items():
            if weight is not self._masters[name]:
                weight.copy_(self._masters[name])

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs besides the optimizer's states, name to tensor."""
        return {**self.inner.state(), **{f"{name}.values": each.detach() for name, each in self._masters.items()}}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, and write it into the weights."""
        self.inner.load_state(state)
        for name, master in self._masters.items():
            master.copy_(state[f"{name}.values"])
        self.write_back()

    @torch.no_grad()
    def detach(self) -> None:
        """Take everything off the model, whose head is as it was at first."""
        self.inner.detach()
        for hook in self._hooks:
            hook.remove()
        for name, weight in self._weights.items():
            weight.copy_(self._first[name])

    def save_result(self, folder: Path) -> None:
        """Write the result of the base, the head in fp32 beside it, and the labels into delta.json."""
        self.inner.save_result(folder)
        save_file({name: each.detach().contiguous() for name, each in self._masters.items()}, folder / HEAD_FILE)
        info = replace(read_info(folder), labels=self._labels)
        (folder / "delta.json").write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")


def read_head(folder: Path) -> dict[str, Tensor]:
    """Return the trained head in the result of a run, name to fp32 tensor; empty for a causal model.

    Raises:
        DeltaError: the result is that of a classification, and its head cannot be read.
    """
    if read_info(folder).labels is None:
        return {}
    try:
        head: dict[str, Tensor] = load_file(folder / HEAD_FILE)
        return head
    except (OSError, SafetensorError) as error:
        raise DeltaError(
            f"{str(folder / HEAD_FILE)!r} cannot be read ({type(error).__name__}: {error}), and without it a "
            "classification has no labels to give. Train the run again."
        ) from None


@torch.no_grad()
def apply_head(model: PreTrainedModel, head: Mapping[str, Tensor]) -> Switch:
    """Put a trained head into `model`, rounded to the dtype of its weights.

    Returns:
        A function that puts the head that was there back (False), and the trained one in again (True).

    Raises:
        DeltaError: the model has no such head.
    """
    weights = dict(model.named_parameters())
    misfit = [name for name, each in head.items() if name not in weights or weights[name].shape != each.shape]
    if misfit:
        raise DeltaError(f"This result has a head {misfit[0]!r} that the model does not have. Load it over its base.")
    before = {name: weights[name].detach().clone() for name in head}

    @torch.no_grad()
    def switch(applied: bool) -> None:
        for name, tensor in (head if applied else before).items():
            weights[name].copy_(tensor)

    switch(True)
    return switch
