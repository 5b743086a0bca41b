"""Optimizers over the values of a delta. A delta's values are ordinary parameters, so torch's optimizers serve.

Weight decay acts on the values: it pulls the change towards zero, that is the model towards its base.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from engine.sparse.adamw import aged_update
from engine.sparse.compiled import CompiledUpdate, Numbers, Settings
from engine.sparse.entries import ActiveEntries
from engine.sparse.states import SCALES, Moments, StateStore

ADAM_BETAS = (0.9, 0.999)  # arXiv:2312.11875 names AdamW without further settings: torch's defaults
ADAM_EPS = 1e-8
SPIEL_ADAM_EPS = 1e-6  # as published with arXiv:2401.16405
IN_PLACE = StateStore()


def clip_gradient(values: Sequence[nn.Parameter], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients of all values together to at most `max_norm`; nobody waits for the device.

    Returns:
        Their norm before, and the factor they were scaled by, at most 1, in fp64: 0-dim, where the gradients are.
    """
    most = float("inf") if max_norm is None else max_norm
    norm = nn.utils.clip_grad_norm_(values, most)
    return norm, (most / (norm.double() + 1e-6)).clamp(max=1.0)  # the factor as torch computes it


@dataclass(frozen=True)
class EntrySeeds:
    """The optimizer state that newly grown entries begin with.

    `places`: (n,) int64 in the arrays of the values; `exp_avg`, `exp_avg_sq`: (n,); `age`: updates they stand for.
    """

    places: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: int


class SparseAdamW(torch.optim.Optimizer):
    """AdamW over the values of a delta, whose states are kept as a `StateStore` says.

    Where entries move (`aged`): value -= lr `aged_update`, then value -= lr weight_decay value, as published with
    SpIEL. With all ages equal this is Adam with eps scaled by the bias correction. Where they stay, one age serves a
    whole tensor, and the update is torch's fused AdamW, bit for bit.
    """

    def __init__(
        self,
        values: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = SPIEL_ADAM_EPS,
        weight_decay: float = 0.0,
        *,
        store: StateStore = IN_PLACE,
        aged: bool = True,
        split: Iterable[ActiveEntries] = (),
        compiled: bool | None = None,
    ) -> None:
        """Prepare; the states of a tensor, of zero, come with its first gradient.

        Args:
            values: the parameters.
            lr: rate of the first update.
            betas: of the moments.
            eps: added to the root of the second one.
            weight_decay: share of the values taken away at a rate of 1.
            store: keeps the states.
            aged: whether each entry has an age of its own.
            split: the entries among `values` whose numbers are read and written there, one weight's at a time.
            compiled: whether updates with 8-bit states are compiled (`compiled.py`); by default those on a GPU.
        """
        self.betas = betas
        self._split = {entry.values: entry for entry in split}
        self._compiled = compiled
        self._run = CompiledUpdate()
        self._store = store
        self._aged = aged
        super().__init__(values, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every value that has a gradient; ages count this update."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            moving = [values for values in group["params"] if values.grad is not None]
            for device in {values.device for values in moving}:
                here = [values for values in moving if values.device == device]
                states = [self.state_of(values) for values in here]
                for packed, values in zip(self._store.visit(states, device), here, strict=True):
                    compiled = device.type == "cuda" if self._compiled is None else self._compiled
                    if compiled and "exp_avg" + SCALES in packed and values.dtype == torch.float32:
                        self._run_compiled(values, packed, group)
                    else:
                        moments = self._store.unpack(packed, values)
                        self._update(values, moments, group)
                        packed.update(self._store.pack(moments))

    def _run_compiled(self, parameter: nn.Parameter, packed: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        settings = Settings(self.betas, group["eps"], group["weight_decay"])
        grad, entry = parameter.grad, self._split.get(parameter)

        def step(*numbers: Tensor) -> Numbers:
            now, states = self._run(numbers, grad, packed, group["lr"], settings)
            packed.update(states)
            return now

        if entry is None:
            parameter.copy_(step(parameter.detach())[0])
        else:
            entry.update_halves(step)

    def _update(self, parameter: nn.Parameter, moments: Moments, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        entry = self._split.get(parameter)
        if entry is None:
            self._change(parameter, parameter.grad, moments, group)
        else:
            entry.update_values(partial(self._change, grad=parameter.grad, moments=moments, group=group))

    def _change(self, values: Tensor, grad: Tensor, moments: Moments, group: dict[str, Any]) -> None:
        rate, decay = group["lr"], group["weight_decay"]
        if self._aged:
            values.sub_(rate * aged_update(values, grad, moments, self.betas, group["eps"]))
            values.sub_(rate * decay * values)
            return
        adamw(
            [values],
            [grad],
            [moments.exp_avg],
            [moments.exp_avg_sq],
            [],
            [moments.age],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=decay,
            eps=group["eps"],
            maximize=False,
        )

    def state_of(self, values: nn.Parameter) -> dict[str, Tensor]:
        """Return the states of `values`, begun where there are none."""
        if not self.state[values]:
            self.state[values] = self._store.begin(values, aged=self._aged)
        state: dict[str, Tensor] = self.state[values]
        return state

    def put_state(self, values: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Take back the states of `values` from a checkpoint."""
        self.state[values] = self._store.place(state, values.device)

    def moments(self, values: nn.Parameter) -> Moments:
        """Return the states of `values` on their device, ready to read."""
        packed = {name: tensor.to(values.device) for name, tensor in self.state_of(values).items()}
        return self._store.unpack(packed, values)

    @torch.no_grad()
    def remap(self, values: nn.Parameter, source: Tensor, seeds: EntrySeeds) -> None:
        """Move the states to where their entries are now, and seed those of new entries.

        Args:
            values: the parameter whose entries were replaced; it may have more or fewer of them than before.
            source: (num_active,) int64, the place of each entry before, or -1 for a new one.
            seeds: for every entry with source -1.
        """
        begun = bool(self.state[values])
        if not begun and not seeds.age:
            return  # states of zero come with the first gradient
        assert self._aged, "the entries of this optimizer are all of one age"
        moments = self.moments(values)
        if begun:  # else they are of zero, and as many as there are entries now
            kept = source.clamp(min=0)
            moments = Moments(moments.exp_avg[kept], moments.exp_avg_sq[kept], moments.age[kept])
        moments.exp_avg[seeds.places] = seeds.exp_avg
        moments.exp_avg_sq[seeds.places] = seeds.exp_avg_sq
        moments.age[seeds.places] = seeds.age
        self.put_state(values, self._store.pack(moments))
