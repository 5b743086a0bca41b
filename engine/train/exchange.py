"""What the processes of a run exchange in every step: the gradients of what is trained, and nothing else."""

import torch

from engine.sparse.peers import Peers
from engine.train.tuning import Tuning


def exchange_gradients(tuning: Tuning, peers: Peers) -> None:
    """Sum the gradients over the processes, in one exchange: of all values, and what SpIEL takes besides.

    Of n trained entries 4 n bytes, as many more in an estimation phase of SpIEL-AG; a full tuning sends the gradient of
    every weight.
    """
    if peers.count == 1:
        return
    values = tuning.values
    reached = peers.totals([each.grad is not None for each in values])
    for each, times in zip(values, reached, strict=True):
        if times and each.grad is None:  # a gradient came in another process only
            each.grad = torch.zeros_like(each)
    besides = [] if tuning.spiel is None else tuning.spiel.gradients()
    peers.add_all([*(each.grad for each in values if each.grad is not None), *besides])
