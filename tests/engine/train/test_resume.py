"""A worker that is killed with SIGKILL and started again ends with the bits of one that was not.

The workers are forked, two at a time.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import runs
from engine.events import Stepped
from engine.runs import Run
from engine.spec import RunSpec, choices
from engine.train import worker

STEPS = 50
TIMEOUT_S = 120.0
CASES = [(method, "none") for method in choices("method")]
CASES += [(method, "nf4") for method in ("sift", "spiel-ag", "spiel-ma", "lora")]
CASES += [("sift", "compact"), ("spiel-ag", "compact")]
BASES: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"quantization": "nf4"},
    "compact": {"dtype": "bfloat16", "optimizer_states": "compact"},
}
Pair = tuple[Run, Run, int]
pytestmark = pytest.mark.xdist_group("forked")


def _start(run: Run) -> Any:
    process = multiprocessing.get_context("forkserver").Process(target=worker.main, args=(run,), daemon=True)
    process.start()
    return process


def _losses(run: Run) -> dict[int, float]:
    """Return the loss of each step as it was reported last."""
    events = (record.event for record in runs.read_events(run)[0])
    return {event.step: event.loss for event in events if isinstance(event, Stepped)}


def _kill_at(run: Run, step: int) -> int:
    """Kill the worker of `run` once it has done `step` steps; return the step after which its checkpoint goes on."""
    process, deadline = _start(run), time.monotonic() + TIMEOUT_S
    done = offset = 0
    while done < step:
        records, offset = runs.read_events(run, offset)
        done = max((each.event.step for each in records if isinstance(each.event, Stepped)), default=done)
        assert time.monotonic() < deadline, runs.read_status(run)
        assert process.is_alive(), runs.read_status(run)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    checkpoint = runs.latest_checkpoint(run)
    return int(checkpoint.name) if checkpoint else 0


def _both(fields: dict[str, Any], folder: Path, step: int) -> Pair:
    """Train the same spec without a break, and with a kill after `step`."""
    whole, broken = (
        runs.create_run(RunSpec(**fields, output=str(folder / name))) for name in ("whole", "broken")
    )  # fmt: skip
    unbroken = _start(whole)
    went_on_from = _kill_at(broken, step)
    resumed = _start(broken)
    for process in (unbroken, resumed):
        process.join(TIMEOUT_S)
    return whole, broken, went_on_from


@pytest.fixture(scope="module")
def pairs(
    model_folder: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Pair]]]:
    common = {
        "model": str(model_folder),
        "dataset": str(dataset_folder),
        "num_trainable": 2000,
        "learning_rate": 5e-3,
        "period": 8,
        "estimation_steps": 5,  # checkpoints fall into phases and between them
        "sequence_length": 64,
        "micro_batch_size": 2,
        "gradient_accumulation": 2,
        "max_steps": STEPS,
        "evaluation_interval": 0,
        "evaluation_rows": 2,
        "probe_interval": 10,
        "checkpoint_interval": 5,
    }
    rng = random.Random(0)
    with ThreadPoolExecutor(1) as pool:
        yield {
            (method, base): pool.submit(
                _both,
                {**common, "method": method, **BASES[base]},
                tmp_path_factory.mktemp(f"{method}-{base}"),
                rng.randrange(6, STEPS - 30),
            )
            for method, base in CASES
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("method", "base"), CASES)
def test_killed_run_ends_with_the_bits_of_an_unbroken_one(
    pairs: dict[tuple[str, str], Future[Pair]], method: str, base: str
) -> None:
    whole, broken, went_on_from = pairs[method, base].result()
    assert [runs.read_status(run).state for run in (whole, broken)] == ["finished", "finished"], runs.read_status(
        broken
    )
    assert 0 < went_on_from < STEPS
    assert _losses(whole) == _losses(broken)  # the same rows in the same order
    for name in (f"checkpoints/{STEPS}/values.safetensors", f"delta/{_result(method)}.safetensors"):
        first, second = (load_file(run.path / name) for run in (whole, broken))
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])]
    figures = [json.loads((run.path / "report.json").read_text())["evaluation_loss"] for run in (whole, broken)]
    assert figures[0] == figures[1]


def _result(method: str) -> str:
    return "adapter_model" if method in ("lora", "ia3") else "delta"
