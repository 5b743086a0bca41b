"""Random numbers that leave no trace."""

from contextlib import AbstractContextManager

import torch


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Return a context after which the random numbers of the CPU and of `device` go on as if nothing had been drawn.

    Other GPUs are left alone: to read a state there would take memory on each.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
