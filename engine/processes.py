"""How a process of this program is started: its words and its environment. Never torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from engine.hub import hub_online
from engine.units import MIB

STOP_TIMEOUT_S = 5.0  # for a process to end by itself
PROJECT = Path(__file__).resolve().parent.parent


def command_of(*arguments: str) -> list[str]:
    """Return the words that start this program with `arguments`."""
    return [sys.executable, "-m", "engine", *arguments]


def training_command(folder: Path, processes: int) -> list[str]:
    """Return the words that start the training of the run in `folder`: one worker, or torchrun with several."""
    command = command_of("worker", str(folder))
    if processes == 1:
        return command
    return [*command[:2], "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command[1:]]


def training_environment(processes: int) -> dict[str, str]:
    """Return the environment of a run of so many processes: they share the cores."""
    environment = worker_environment()
    if processes == 1:
        return environment
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **environment}


def worker_environment() -> dict[str, str]:
    """Return the environment in which a worker runs."""
    hub_online()  # asked once here; workers read the verdict from the environment
    path = os.pathsep.join(part for part in (str(PROJECT), os.environ.get("PYTHONPATH", "")) if part)
    # Threads that wait do not spin: beside a busy browser that takes two to four times as long.
    # Large blocks go back to the system when they are freed, so that resident memory is what the plan counts.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    defaults["MALLOC_TRIM_THRESHOLD_"] = str(4 * MIB)
    # oneDNN, which multiplies bf16 on the CPU, keeps code and repacked weights for every length of a batch that it met.
    defaults["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "64"
    # PEFT asks transformers for something by a name that newer releases call old: nobody here could mend that.
    defaults["PYTHONWARNINGS"] = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    # cuda:1 is the card that NVML, by which runs are planned, calls 1: CUDA's own order begins with the fastest.
    defaults["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    # On Hopper and data center Blackwell PyTorch takes cuDNN's attention first, which builds a plan for every length of
    # a batch that it has not seen, 0.4 s forward and 0.6 s backward (FunASR, #3704). Next is flash.
    defaults["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    return {**defaults, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def child_process(*arguments: str, errors: IO[Any]) -> subprocess.Popen[str]:
    """Start `python -m engine` with `arguments`; it is spoken to through its pipes and ends when they close."""
    return subprocess.Popen(
        command_of(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        env=worker_environment(),
    )
