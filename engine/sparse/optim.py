"""Optimizers over the values of a delta. A delta's values are ordinary parameters, so torch's optimizers serve.

Weight decay acts on the values: it pulls the change towards zero, that is the model towards its base.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.999)  # arXiv:2312.11875 names AdamW without further settings: torch's defaults
ADAM_EPS = 1e-8
SPIEL_ADAM_EPS = 1e-6  # as published with arXiv:2401.16405


def clip_gradient(values: Sequence[nn.Parameter], max_norm: float | None) -> tuple[float, float]:
    """Scale the gradients of all values together to at most `max_norm`.

    Returns:
        Their norm before, and the factor they were scaled by, at most 1.
    """
    norm = float(nn.utils.clip_grad_norm_(values, float("inf") if max_norm is None else max_norm))
    # The factor as torch computes it.
    return norm, 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


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
    """Adam whose bias correction knows the age of each entry; weight decay comes after the update.

    value -= lr m (sqrt(1 - b2^age)) / ((sqrt(v) + eps) (1 - b1^age)), as published with SpIEL (arXiv:2401.16405), then
    value -= lr weight_decay value. With all ages equal this is Adam with eps scaled by the bias correction.
    """

    def __init__(
        self,
        values: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = SPIEL_ADAM_EPS,
        weight_decay: float = 0.0,
    ) -> None:
        """Prepare moments and ages of zero, (num_active,) each a weight; ages are int32."""
        self.betas = betas
        super().__init__(values, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter).detach(),
                    "exp_avg_sq": torch.zeros_like(parameter).detach(),
                    "age": torch.zeros_like(parameter, dtype=torch.int32).detach(),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every value that has a gradient; ages count this update."""
        assert closure is None, "closures are not supported"
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is None:
                    continue
                state, grad = self.state[values], values.grad
                state["age"].add_(1)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                age = state["age"].to(values.dtype)
                denominator = (state["exp_avg_sq"].sqrt() + group["eps"]) * (1 - beta1**age)
                update = state["exp_avg"] * (1 - beta2**age).sqrt() / denominator
                values.sub_(group["lr"] * update)
                values.sub_(group["lr"] * group["weight_decay"] * values)

    @torch.no_grad()
    def remap(self, values: nn.Parameter, source: Tensor, seeds: EntrySeeds) -> None:
        """Move the states to where their entries are now, and seed those of new entries.

        Args:
            values: the parameter whose entries were replaced.
            source: (num_active,) int64, the place of each entry before, or -1 for a new one; there may be more or fewer
                entries than before.
            seeds: for every entry with source -1.
        """
        state = self.state[values]
        for name in ("exp_avg", "exp_avg_sq", "age"):
            state[name] = state[name][source.clamp(min=0)]
        state["exp_avg"][seeds.places] = seeds.exp_avg
        state["exp_avg_sq"][seeds.places] = seeds.exp_avg_sq
        state["age"][seeds.places] = seeds.age
