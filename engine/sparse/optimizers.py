"""The optimizer that a spec names, over the values of its entries.

torch's own are used as they stand, with their default settings. Their weight decay is added to the gradient, but for
adamw, which shrinks the values themselves; rprop has none. rprop reads the learning rate at its first step only, asgd
one step late; its average is kept and not used.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from engine.sparse.entries import ActiveEntries
from engine.sparse.optim import ADAM_BETAS, ADAM_EPS, SPIEL_ADAM_EPS, SparseAdamW
from engine.sparse.sm3 import SM3, SM3_EPS
from engine.sparse.states import StateStore
from engine.spec import RunSpec
from engine.spec_rules import entries_move, optimizer_of

# Those of torch that update each entry by itself. Not muon (needs matrices), lbfgs (needs a closure), or adafactor: its
# steps are a share of the size of the values, and a change from the base begins at zero.
ELEMENTWISE: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}


def build_optimizer(
    entries: Sequence[ActiveEntries],
    spec: RunSpec,
    *,
    betas: tuple[float, float] = ADAM_BETAS,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    Args:
        entries: whose values are trained.
        spec: the optimizer group, `method`, and what else decides whether entries move.
        betas: of AdamW.
        eps: instead of the method's own.
    """
    if optimizer_of(spec) == "sm3":
        return SM3(entries, spec.learning_rate, SM3_EPS if eps is None else eps, spec.weight_decay)
    own = SPIEL_ADAM_EPS if spec.method == "spiel-ag" else ADAM_EPS
    values, split = [entry.values for entry in entries], [entry for entry in entries if entry.split]
    return values_optimizer(values, spec, betas=betas, eps=own if eps is None else eps, split=split)


def values_optimizer(
    values: Sequence[nn.Parameter],
    spec: RunSpec,
    *,
    betas: tuple[float, float] = ADAM_BETAS,
    eps: float = ADAM_EPS,
    split: Sequence[ActiveEntries] = (),
) -> torch.optim.Optimizer:
    """Return AdamW, SGD or another of torch's over `values`, which may be of any shape.

    torch's fused AdamW, without temporaries, where the entries stay, their states too, and in fp32; else our own.
    `split`: the entries among `values` whose parameters hold no numbers; of all optimizers our AdamW alone takes such.
    """
    name, rate, decay = optimizer_of(spec), spec.learning_rate, spec.weight_decay
    store = StateStore(eight_bit=spec.optimizer_states != "float32", offload=spec.offload_states)
    aged = entries_move(spec)
    if name == "adamw" and (aged or store != StateStore()):
        return SparseAdamW(values, rate, betas, eps, decay, store=store, aged=aged, split=split)
    if name == "adamw":
        return torch.optim.AdamW(values, lr=rate, betas=betas, eps=eps, weight_decay=decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(values, lr=rate, weight_decay=decay, fused=True)
    settings = {} if name == "rprop" else {"weight_decay": decay}
    # foreach would make temporaries of all values at once.
    return ELEMENTWISE[name](values, lr=rate, foreach=False, **settings)
