"""Attach sparse tuning to a model: `attach(model, spec)` gives parameters for any optimizer, and writes them back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.sparse.base_weight import NF4Weight, base_weights
from engine.sparse.delta import DeltaInfo, SparseDelta, fingerprint
from engine.sparse.entries import ActiveEntries
from engine.sparse.gradients import LinearGradients
from engine.sparse.hooks import GradientHooks
from engine.sparse.linear import LinearFunctions, plain_linear_weights
from engine.sparse.optim import EntrySeeds, SparseAdamW
from engine.sparse.optimizers import build_optimizer
from engine.sparse.peers import ALONE, Peers
from engine.sparse.placing import place_by_magnitude, place_random
from engine.sparse.probe import GradientProbe
from engine.sparse.recompute import RecomputedBlocks, kept_by_model
from engine.sparse.selection import GlobalChoice
from engine.sparse.sift import GradientSelection
from engine.sparse.sm3 import SM3
from engine.sparse.spiel import Schedule, Spiel, SpielMA
from engine.sparse.spiel_ag import SpielAG
from engine.spec import BASELINES, RunSpec
from engine.targets import match_targets, num_active_of


class SparseTuning:
    """Sparse tuning at work on a model. Made by `attach`.

    One optimizer step: the backward of each micro-batch, `end_micro_step` after each, then the optimizer over `values`,
    then `write_back`. Gradients of micro-batches are summed in fp32 into `values.grad`; divide the losses accordingly.
    """

    def __init__(
        self, model: nn.Module, entries: list[ActiveEntries], spec: RunSpec, *, functions: bool = True
    ) -> None:
        """Prefer `attach`, which finds the targets and makes the entries.

        Args:
            model: frozen but for the entries, until `detach`.
            entries: the targets.
            spec: the settings of the method are read.
            functions: take gradients of plain linear layers by `LinearFunctions`; else by hooks wherever these do.
        """
        self.entries = entries
        self.spec = spec
        self.probe: GradientProbe | None = None
        self.spiel: Spiel | None = None
        self._peers = ALONE
        self._overflowed = False
        self.replaced = 0
        """Entries that the last selection put in the stead of others."""
        self._selection: GradientSelection | None = None
        self._choice: GlobalChoice | None = None  # one budget over all weights
        self._last_pass = True
        self._optimizer: torch.optim.Optimizer | None = None
        self._budget = sum(entry.num_active for entry in entries)
        self._fingerprint = fingerprint({entry.name: entry.weight for entry in entries})
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        # The loss in chunks multiplies by the output layer's weight itself, so a forward put in its place never runs.
        taken = _output_weight(model) if spec.chunked_loss else None
        by_function = [
            entry
            for entry in plain_linear_weights(model, entries)
            if (functions and entry.weight is not taken) or isinstance(entry.weight, NF4Weight)
        ]
        by_hook = [entry for entry in entries if entry not in by_function]
        self._linear = LinearGradients(by_function, spec.gradient_way, spec.micro_batch_size * spec.sequence_length)
        self._ways = (
            LinearFunctions(model, by_function, self._take_factors),
            GradientHooks(by_hook, self._take),
            RecomputedBlocks(model, kept_by_model(spec, model), {entry.name for entry in entries}),
        )

    @property
    def values(self) -> list[nn.Parameter]:
        """The trained parameters, one a target, (num_active,) each."""
        return [entry.values for entry in self.entries]

    @property
    def named_values(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the name of their target."""
        return {entry.name: entry.values for entry in self.entries}

    @property
    def num_targets(self) -> int:
        """Weights of which entries are trained."""
        return len(self.entries)

    @property
    def num_active(self) -> int:
        """Trained entries over all targets."""
        return sum(entry.num_active for entry in self.entries)

    @property
    def target_numel(self) -> int:
        """Entries of all targets, trained or not."""
        return sum(entry.weight.numel() for entry in self.entries)

    @property
    def gradient_share(self) -> float:
        """Multiplications for the gradients of the values, of those for the dense gradients of all targets."""
        by_function = sum(entry.weight.numel() for entry in self._linear.entries)
        return 1.0 - (by_function - self._linear.multiplied()) / self.target_numel

    @property
    def selecting(self) -> bool:
        """Whether the trained entries are still to be chosen from gradients."""
        return self._selection is not None

    def join(self, peers: Peers) -> None:
        """Choose entries together with the other processes of a run, which do the same; before `begin_reselection`.

        The gradients of the values are for the caller to sum.
        """
        self._peers = peers
        if peers.count > 1:  # else each would have measured costs, and so ways, of its own
            self._linear.load_state(peers.from_first(self._linear.state()))

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer that the spec names, over `values`."""
        return build_optimizer(self.entries, self.spec)

    def begin_selection(
        self, micro_steps: int, *, keep_gradient: bool = True, entries: Sequence[ActiveEntries] | None = None
    ) -> None:
        """Let the next `micro_steps` backwards choose the entries; see `GradientSelection`.

        Entries that are trained already and are not chosen again keep their change (`ActiveEntries.move`).

        Args:
            micro_steps: micro-batches whose summed gradient chooses.
            keep_gradient: whether that gradient becomes the one of the coming update.
            entries: choose in these only; call again for the others, in the order of `self.entries`.
        """
        watched = self.entries if entries is None else entries
        if self.spec.allocation == "global" and watched[0] is self.entries[0]:
            self._choice = GlobalChoice(self._budget)
        if watched[0] is self.entries[0]:
            self.replaced, self._overflowed = 0, False
        self._selection = GradientSelection(
            watched,
            micro_steps,
            self._place,
            keep_gradient=keep_gradient,
            squared=self.spec.method == "fisher",
            choice=self._choice,
            structure=self.spec.structure,
            peers=self._peers,
        )
        self._last_pass = watched[-1] is self.entries[-1]

    def _place(self, entry: ActiveEntries, indices: Tensor) -> None:
        if not entry.is_placed:
            entry.place(indices)
            source = torch.full_like(indices, -1, dtype=torch.int64)
        else:
            source = entry.move(indices)
        new = (source < 0).nonzero().flatten()
        self.replaced += new.numel()
        if isinstance(self._optimizer, SparseAdamW):
            nothing = entry.values.new_zeros(new.numel()).detach()
            self._optimizer.remap(entry.values, source, EntrySeeds(new, nothing, nothing, age=0))

    def begin_reselection(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Let entries change places while training, where the method does so: states of `optimizer` move with them.

        Args:
            optimizer: over `values`: `SparseAdamW` for spiel-ag, `SM3` for spiel-ma.
            total_steps: of the whole run; the replaced share falls to zero over them.
        """
        spec = self.spec
        self._optimizer = optimizer
        schedule = Schedule(spec.period, spec.estimation_steps, spec.initial_rate, spec.schedule, total_steps)
        if spec.method == "spiel-ag":
            assert isinstance(optimizer, SparseAdamW)
            together = spec.allocation == "global"
            micro_steps = spec.gradient_accumulation
            self.spiel = SpielAG(self.entries, optimizer, schedule, micro_steps, together=together, peers=self._peers)
        elif spec.method == "spiel-ma":
            assert isinstance(optimizer, SM3)
            self.spiel = SpielMA(self.entries, optimizer, schedule)

    def _take_factors(self, entry: ActiveEntries, grad_y: Tensor, x: Tensor) -> None:
        """Take the gradient grad_y.T @ x of a weight: all of it where someone wants it so, else what is wanted."""
        if self._wants_dense(entry):
            self._take(entry, self._linear.dense(grad_y, x))
        elif self._selection is None and entry.is_placed:
            wanted = None if self.spiel is None else self.spiel.wanted(entry)
            gathered, besides = self._linear.gather(entry, wanted, grad_y, x)
            entry.add_gradient(gathered)
            if self.spiel is not None and besides is not None:
                self.spiel.observe_wanted(entry, besides)

    def _wants_dense(self, entry: ActiveEntries) -> bool:
        if self._selection is not None and self._selection.watches(entry):
            return True
        if self.spiel is not None and self.spiel.wants_dense(entry):
            return True
        return self.probe is not None and entry.is_placed

    def _take(self, entry: ActiveEntries, grad: Tensor) -> None:
        if self._selection is not None:
            self._selection.observe(entry, grad)
        elif entry.is_placed:  # else no gradient reached the weight while the entries were chosen
            entry.add_gradient(entry.gather(grad))
        if self.spiel is not None:
            self.spiel.observe(entry, grad)
        if self.probe is not None and entry.is_placed:
            self.probe.observe(entry, grad)

    def end_micro_step(self) -> None:
        """Say that the backward of a micro-batch is over."""
        self._linear.release()
        selection = self._selection
        if selection is None:
            return
        selection.end_micro_step()
        if selection.done:
            self._selection = None
            self._overflowed |= selection.overflowed
            if self._last_pass:
                selection.finish(self.entries)
                self._choice = None

    def finite(self) -> Tensor | bool:
        """Return whether the gradients by which this step chose entries, or candidates, are finite."""
        return not self._overflowed and (self.spiel is None or self.spiel.finite())

    def plan_gradients(self) -> None:
        """Decide how to get the gradients of the entries as they are now, so that no backward has to look at them."""
        self._linear.prepare(lambda entry: None if self.spiel is None else self.spiel.wanted(entry))

    def write_back(self) -> None:
        """Put the values into the weights, after the optimizer's step."""
        for entry in self.entries:
            entry.write_back()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs besides the optimizer's states: indices, values, SpIEL's candidates."""
        state = {**self._linear.state(), **({} if self.spiel is None else self.spiel.state())}
        for entry in self.entries:
            state |= {f"{entry.name}.{part}": tensor for part, tensor in entry.state().items()}
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, and write the values into the weights."""
        self._selection = None
        self._linear.load_state(state)
        for entry in self.entries:
            prefix = f"{entry.name}."
            entry.load_state({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
        if self.spiel is not None:
            self.spiel.load_state(state)
        self.write_back()

    def save_result(self, folder: Path) -> None:
        """Write the delta into `folder`."""
        self.delta().save(folder)

    def delta(self) -> SparseDelta:
        """Return a copy of the delta as it is now."""
        quantised = any(isinstance(entry.weight, NF4Weight) for entry in self.entries)
        info = DeltaInfo(self.spec.method, 0.0, self.spec.model, self._fingerprint, "nf4" if quantised else "none")
        delta = SparseDelta.of(info, self.entries)
        return replace(delta, info=replace(info, density=delta.num_active / self.target_numel))

    def detach(self) -> None:
        """Take the hooks away and give every base weight back, bit for bit."""
        for way in self._ways:
            way.remove()
        for entry in self.entries:
            entry.restore()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)


def _output_weight(model: nn.Module) -> object:
    layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return getattr(layer, "weight", None)


def attach(model: nn.Module, spec: RunSpec, *, functions: bool = True, without: Collection[str] = ()) -> SparseTuning:
    """Make the weights that `spec.targets` names sparsely trainable and freeze all others.

    For `random`, `magnitude` and SpIEL's start the entries are chosen here; for `sift` and `fisher` call
    `begin_selection`, as the training loop does.

    Args:
        model: any torch model; tied weights count once.
        spec: `method`, `targets`, `density` or `num_trainable`, and `seed` are read.
        functions: take gradients of plain linear layers by functions; see `SparseTuning`.
        without: names of parameters that are never targets, such as a classifier's head.

    Raises:
        TargetsError: no parameter matches `spec.targets`.
    """
    assert spec.method not in BASELINES, f"{spec.method} is no sparse method: see engine.train.tuning.start_tuning"
    weights = {name: weight for name, weight in base_weights(model).items() if name not in without}
    names = match_targets({name: tuple(weight.shape) for name, weight in weights.items()}, spec.targets)
    counts = num_active_of({name: weights[name].numel() for name in names}, spec.density, spec.num_trainable)
    compact = spec.optimizer_states == "compact"
    entries = [ActiveEntries(name, weights[name], count, compact=compact) for name, count in counts.items()]
    tuning = SparseTuning(model, entries, spec, functions=functions)
    if spec.method in ("random", "spiel-ag", "spiel-ma"):  # SpIEL starts at random
        structure = spec.structure if spec.method == "random" else "free"
        place_random(entries, structure, torch.Generator().manual_seed(spec.seed))
    elif spec.method == "magnitude":
        place_by_magnitude(entries, spec)
    return tuning
