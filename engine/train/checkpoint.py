"""Checkpoints from which a run goes on as if it had never stopped. Safetensors only, never pickle.

A checkpoint is a folder named after its step: `values.safetensors` (indices, values, optimizer states, RNG) and
`state.json`. It is written beside its place and renamed, so that a folder with a number is always whole.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import RunError
from engine.sparse.optim import SparseAdamW
from engine.sparse.peers import Peers
from engine.train.head import JoinedOptimizer
from engine.train.tuning import Tuning

KEPT = 2  # newest checkpoints that stay


@dataclass(frozen=True)
class Progress:
    """Where a run stands besides its tensors: plain numbers that `state.json` holds.

    `loss_scale` and `steps_at_scale` are of a float16 run: the factor, and the steps since it last changed.
    """

    step: int
    elapsed_s: float
    peak_bytes: int
    loss_scale: float = 1.0
    steps_at_scale: int = 0


def gather_rng(peers: Peers) -> dict[str, Tensor]:
    """Return the random states of the other processes, which call this too, name to tensor; empty where there are none.

    All else that a checkpoint holds is the same in every process.
    """
    found = {}
    for name, state in _rng(0).items():
        for rank, other in enumerate(peers.gather(state)[1:], 1):
            found[f"{name}.{rank}"] = other
    return found


def _rng(rank: int) -> dict[str, Tensor]:
    """Return the random states of this process, number `rank`, as they are called in a checkpoint.

    A run on the CPU does not begin to use a GPU that is there.
    """
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return {f"{name}.{rank}" if rank else name: state for name, state in states.items()}


def save_checkpoint(
    folder: Path,
    tuning: Tuning,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    others: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `progress.step` under `folder` and drop all but the newest `KEPT`.

    `others`: of `gather_rng`.

    Returns:
        The checkpoint's folder.
    """
    tensors = {**_rng(0), **(others or {}), **tuning.state()}
    for name, values in tuning.named_values.items():
        for key, state in optimizer.state[values].items():
            tensors[f"{name}.optimizer.{key}"] = torch.as_tensor(state)
    partial = folder / f".{progress.step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "values.safetensors")
    (partial / "state.json").write_text(json.dumps(progress.__dict__), encoding="utf-8")
    target = folder / str(progress.step)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda p: int(p.name))[:-KEPT]:
        shutil.rmtree(old)
    return target


def load_checkpoint(checkpoint: Path, tuning: Tuning, optimizer: torch.optim.Optimizer, rank: int = 0) -> Progress:
    """Put a checkpoint's indices, values, optimizer states and RNG in place, and write the values into the weights.

    `rank`: of this process among those of the run. One whose random state is not there keeps its own: the run failed
    when it saved.

    Raises:
        RunError: the checkpoint is damaged, or does not fit the model.
    """
    try:
        tensors = load_file(checkpoint / "values.safetensors")
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tuning.load_state(tensors)
        _load_optimizer(tensors, tuning, optimizer)
        rng = _rng(rank)
        cpu, *cuda = [tensors.get(name, own) for name, own in rng.items()]
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state(cuda[0])
        return Progress(**state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"Checkpoint {str(checkpoint)!r} cannot be read ({type(error).__name__}: {error}). "
            "Delete its folder to go on from the one before."
        ) from error


def _load_optimizer(tensors: dict[str, Tensor], tuning: Tuning, optimizer: torch.optim.Optimizer) -> None:
    # Not through load_state_dict, which would turn the integer ages of entries into floats.
    for name, values in tuning.named_values.items():
        prefix = f"{name}.optimizer."
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if not found:
            continue
        part = optimizer.part_of(values) if isinstance(optimizer, JoinedOptimizer) else optimizer
        if isinstance(part, SparseAdamW):
            part.put_state(values, found)
        else:
            # Else torch keeps the count of steps, and what NAdam makes of it, on the CPU.
            on_device = part.param_groups[0].get("fused")
            part.state[values] = {
                key: tensor.to(values.device) if on_device or key not in ("step", "mu_product") else tensor
                for key, tensor in found.items()
            }
