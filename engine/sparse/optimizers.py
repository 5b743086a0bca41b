"""The optimizer that a spec names, over the values of its entries."""

from collections.abc import Sequence

import torch

from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import ADAM_BETAS, ADAM_EPS, SPIEL_ADAM_EPS, SparseAdamW
from engine.sparse.sm3 import SM3, SM3_EPS
from engine.spec import RunSpec
from engine.spec_rules import optimizer_of


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
    match optimizer_of(spec):
        case "sm3":
            return SM3(entries, rate, SM3_EPS if eps is None else eps, decay)
        case "sgd":
            return torch.optim.SGD(values, lr=rate, weight_decay=decay, fused=True)
        case "adamw" if spec.method == "spiel-ag":
            return SparseAdamW(values, rate, betas, SPIEL_ADAM_EPS if eps is None else eps, decay)
    return torch.optim.AdamW(
        values, lr=rate, betas=betas, eps=ADAM_EPS if eps is None else eps, weight_decay=decay, fused=True
    )
