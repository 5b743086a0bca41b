"""Optimizers over the values of a delta. A delta's values are ordinary parameters, so torch's optimizers serve.

Weight decay acts on the values: it pulls the change towards zero, that is the model towards its base.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

ADAM_BETAS = (0.9, 0.999)  # arXiv:2312.11875 names AdamW without further settings: torch's defaults
ADAM_EPS = 1e-8


def build_optimizer(
    values: Iterable[nn.Parameter], name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer that a spec names, in torch's fused form (no temporaries the size of the values).

    Args:
        values: fp32 or fp64 parameters.
        name: `adamw` or `sgd`.
        learning_rate: peak learning rate.
        weight_decay: per step and unit of learning rate.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "adamw":
        return torch.optim.AdamW(
            values, lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=weight_decay, fused=True
        )
    if name == "sgd":
        return torch.optim.SGD(values, lr=learning_rate, weight_decay=weight_decay, fused=True)
    raise ValueError(f"unknown optimizer {name!r}")


def clip_gradient(values: Sequence[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients of all values together to at most `max_norm`; return their norm before, a scalar."""
    return nn.utils.clip_grad_norm_(values, float("inf") if max_norm is None else max_norm)
