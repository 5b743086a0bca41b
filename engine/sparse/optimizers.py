"""The optimizer that a spec names, over the values of its entries."""

from collections.abc import Sequence

import torch
from torch import nn

from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import ADAM_BETAS, ADAM_EPS, SPIEL_ADAM_EPS, SparseAdamW
from engine.sparse.sm3 import SM3, SM3_EPS
from engine.spec import RunSpec
from engine.spec_rules import entries_move, optimizer_of


def build_optimizer(
    entries: Sequence[ActiveEntries],
    spec: RunSpec,
    *,
    betas: tuple[float, float] = ADAM_BETAS,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of a run. Where the entries stay the same, AdamW is torch's fused one: no temporaries.

    Args:
        entries: whose values are trained.
        spec: `optimizer`, `method`, `learning_rate` and `weight_decay` are read.
        betas: of Adam.
        eps: instead of the method's own.
    """
    values = [entry.values for entry in entries]
    rate, decay = spec.learning_rate, spec.weight_decay
    if optimizer_of(spec) == "sm3":
        return SM3(entries, rate, SM3_EPS if eps is None else eps, decay)
    if entries_move(spec) and optimizer_of(spec) == "adamw":
        own_eps = SPIEL_ADAM_EPS if spec.method == "spiel-ag" else ADAM_EPS
        return SparseAdamW(values, rate, betas, own_eps if eps is None else eps, decay)
    return plain_optimizer(values, spec, betas=betas, eps=ADAM_EPS if eps is None else eps)


def plain_optimizer(
    values: Sequence[nn.Parameter],
    spec: RunSpec,
    *,
    betas: tuple[float, float] = ADAM_BETAS,
    eps: float = ADAM_EPS,
) -> torch.optim.Optimizer:
    """Return torch's fused SGD or AdamW over `values`: all that a method without moving entries needs."""
    rate, decay = spec.learning_rate, spec.weight_decay
    if optimizer_of(spec) == "sgd":
        return torch.optim.SGD(values, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.AdamW(values, lr=rate, betas=betas, eps=eps, weight_decay=decay, fused=True)
