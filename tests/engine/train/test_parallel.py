"""Two processes that share every step: real ones, over gloo on the CPU.

What they compute is compared with one process that does twice the micro-batches: in fp64, and over 16-bit and 4-bit
bases, where rounding leaves the sums of gradients a little apart. A pair of processes does all cases one after another.
That a run of two keeps house as a run of one does is seen through torchrun.
"""

import copy
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import runs, workers
from engine.data.batches import prepare_data
from engine.events import Stepped
from engine.models import load_classifier, load_model, load_tokenizer
from engine.runs import Run
from engine.sparse.peers import ALONE, PeerLostError, Peers
from engine.spec import RunSpec
from engine.train import worker
from engine.train.checkpoint import gather_rng, load_checkpoint, save_checkpoint
from engine.train.control import NeverAsked
from engine.train.head import HeadedTuning
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.tuning import start_tuning

CPU = torch.device("cpu")
TIMEOUT_S = 120.0
pytestmark = pytest.mark.xdist_group("forked")
ROUNDING = 1e-6  # where sums are in fp32: values of about 0.02 came within 2e-8
Folders = Mapping[str, Path]  # of the model, and of the rows of each task
CASES: dict[str, dict[str, Any]] = {
    "sift": {"method": "sift"},
    "sift, one micro-batch each": {"method": "sift", "gradient_accumulation": 1},
    "sift, in passes": {"method": "sift", "selection_memory_gib": 120_000 / 2**30},
    "sift, chosen anew": {"method": "sift", "reselection_period": 3, "allocation": "global"},
    "fisher": {"method": "fisher", "selection_micro_steps": 6},
    "random, read late": {"method": "random", "logging_interval": 4},
    "magnitude": {"method": "magnitude"},
    "spiel-ag": {"method": "spiel-ag"},
    "spiel-ag, one micro-batch each": {"method": "spiel-ag", "gradient_accumulation": 1},
    "spiel-ag, in passes": {"method": "spiel-ag", "selection_memory_gib": 120_000 / 2**30},
    "spiel-ag, one budget": {"method": "spiel-ag", "allocation": "global"},
    "spiel-ma": {"method": "spiel-ma"},
    "lora": {"method": "lora"},
    "ia3": {"method": "ia3"},
    "full": {"method": "full", "targets": "attention"},
    "sift, with a head": {"method": "sift", "task": "classification"},
    "spiel-ma, with a head": {"method": "spiel-ma", "task": "classification"},
    "lora, with a head": {"method": "lora", "task": "classification"},
    "sift, over nf4": {"method": "sift", "quantization": "nf4"},
    "spiel-ag, over nf4, with a head": {"method": "spiel-ag", "quantization": "nf4", "task": "classification"},
    "sift, over bf16, with a head": {"method": "sift", "dtype": "bfloat16", "task": "classification"},
    "spiel-ag, over bf16": {"method": "spiel-ag", "dtype": "bfloat16"},
    "full, over bf16": {"method": "full", "targets": "attention", "dtype": "bfloat16"},
    "sift, over fp16, with a head": {"method": "sift", "dtype": "float16", "task": "classification"},
    "spiel-ag, over fp16": {"method": "spiel-ag", "dtype": "float16"},
}


@pytest.fixture(scope="module")
def folders(model_folder: Path, dataset_folder: Path, pairs_folder: Path) -> Folders:
    return {"model": model_folder, "causal": dataset_folder, "classification": pairs_folder}


def _spec(folders: Folders, **fields: Any) -> RunSpec:
    values = {"density": 0.05, "learning_rate": 5e-3, "max_steps": 6, "sequence_length": 64, "probe_interval": 3}
    values |= {"period": 4, "estimation_steps": 2, "micro_batch_size": 2, "gradient_accumulation": 2, **fields}
    dataset = folders[values.get("task", "causal")]
    return RunSpec(model=str(folders["model"]), dataset=str(dataset), **values)


def _exact(spec: RunSpec) -> bool:
    """Return whether a run of `spec` is done in fp64."""
    return (spec.dtype, spec.quantization) == ("auto", "none")


@cache
def _loaded(**fields: Any) -> Any:
    spec = RunSpec(**fields)
    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    if data.labels is None:
        model, head = load_model(spec, CPU), ()
    else:
        model, head = load_classifier(spec, CPU, data.labels.names)
    return tokenizer, data, model.double() if _exact(spec) else model, head


def _trainer(spec: RunSpec, peers: Peers) -> Trainer:
    read = ("model", "dataset", "task", "dtype", "quantization", "sequence_length")
    tokenizer, data, base, head = _loaded(**{name: getattr(spec, name) for name in read})
    model = copy.deepcopy(base)
    tuning = start_tuning(model, spec, head)
    if head:
        tuning = HeadedTuning(tuning, model, head, data.labels.names, spec)
    trainer = Trainer(
        spec,
        model,
        tokenizer,
        data,
        tuning,
        tuning.make_optimizer(),
        lambda _: None,
        NeverAsked(),
        lambda _: None,
        MemoryMeter(CPU),
        peers,
    )
    if spec.dtype == "float16":  # too large for every micro-batch at first, and then for one of them
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    return trainer


def _state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.tuning.state().items()}


def _alone(spec: RunSpec) -> dict[str, Tensor]:
    """Return what one process ends with that does the micro-batches of both."""
    trainer = _trainer(spec.model_copy(update={"gradient_accumulation": 2 * spec.gradient_accumulation}), ALONE)
    trainer.run()
    return _state(trainer)


def _enter(rank: int, port: int) -> None:
    """Be process `rank` as torchrun has it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)


def _start_two(work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start two processes that do `work`."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, port, *arguments), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def _wait_for_both(processes: list[Any]) -> None:
    for process in processes:
        process.join(TIMEOUT_S)
    assert [process.exitcode for process in processes] == [0, 0]


def _one_of_two(rank: int, port: int, folders: Folders, folder: Path) -> None:
    """Do all cases as process `rank`; write what each ends with, unbroken and gone on from a checkpoint."""
    _enter(rank, port)
    peers = Peers.join(2, on_cpu=True)
    for name, fields in CASES.items():
        spec = _spec(folders, num_processes=2, **fields)
        whole = _trainer(spec, peers)
        checkpoint = folder / name / "checkpoints"

        def save(trainer: Trainer, checkpoint: Path = checkpoint) -> None:
            others = gather_rng(peers)
            if peers.is_first:
                save_checkpoint(checkpoint, trainer.tuning, trainer.optimizer, trainer.progress(), others)

        whole.save = save
        whole.control.checkpoint_requested = lambda trainer=whole: trainer.step == 4  # type: ignore
        whole.run()
        peers.from_first(None)  # it is written
        resumed = _trainer(spec, peers)
        resumed.go_on_from(load_checkpoint(checkpoint / "4", resumed.tuning, resumed.optimizer, rank))
        resumed.run()
        for kind, trainer in (("whole", whole), ("resumed", resumed)):
            save_file(_state(trainer), folder / name / f"{kind}-{rank}.safetensors")
    peers.leave()


@pytest.fixture(scope="module")
def pair(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes wrote the ends of all cases into."""
    folder = tmp_path_factory.mktemp("pair")
    for name in CASES:
        (folder / name).mkdir()
    _wait_for_both(_start_two(_one_of_two, folders, folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does_with_twice_the_micro_batches(pair: Path, name: str, folders: Folders) -> None:
    """To the rounding of sums; the entries are the very same."""
    spec = _spec(folders, **CASES[name])
    expected, found = _alone(spec), load_file(pair / name / "whole-0.safetensors")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key], tensor, atol=1e-9 if _exact(spec) else ROUNDING, rtol=0)
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_both_processes_hold_the_same_bits_and_go_on_to_them(pair: Path, name: str) -> None:
    first, *others = [
        load_file(pair / name / f"{kind}-{rank}.safetensors") for kind in ("whole", "resumed") for rank in (0, 1)
    ]
    for other in others:
        assert [key for key, tensor in first.items() if not torch.equal(tensor, other[key])] == []


def _ranks(launcher: int) -> list[psutil.Process]:
    """Return the processes that torchrun started."""
    return [each for each in psutil.Process(launcher).children() if "worker" in each.cmdline()]


def _wait_for(run: Run, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{runs.read_status(run)}\n{runs.log_tail(run, 200)}"
        time.sleep(0.05)


def _lose_one(rank: int, port: int, folder: Path) -> None:
    _enter(rank, port)
    peers = Peers.join(2, on_cpu=True)
    peers.totals([rank])
    if rank:
        peers.leave_word("The device ran out of memory.")
        return
    try:
        peers.totals([rank])
    except PeerLostError as error:
        (folder / "word").write_text(f"{peers.last_word()} {error}")


def test_a_process_that_ends_can_say_why_and_the_others_notice(tmp_path: Path) -> None:
    _wait_for_both(_start_two(_lose_one, tmp_path))
    said = "The device ran out of memory. Another process of the run ended; output.log has its last lines."
    assert (tmp_path / "word").read_text() == said


def _main(rank: int, port: int, run: Run) -> None:
    _enter(rank, port)
    sys.exit(worker.main(run))


def test_run_of_two_fails_as_one_goes_on_and_stops_as_asked(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torchrun the follower is killed: nobody is left waiting, and the first process says what happened."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fields = {"num_processes": 2, "evaluation_interval": 0, "evaluation_rows": 2, "preflight": False}
    fields |= {"max_steps": 100_000, "checkpoint_interval": 5, "output": str(tmp_path)}
    run = runs.create_run(_spec(folders, **fields))
    launcher = workers.start_worker(run)
    processes = [psutil.Process(launcher)]
    try:
        _wait_for(run, lambda: runs.latest_checkpoint(run) is not None)
        processes += (ranks := _ranks(launcher))
        (follower,) = (each for each in ranks if each.pid != runs.read_status(run).pid)
        follower.kill()
        _wait_for(run, lambda: not any(each.is_running() for each in processes))
        assert runs.read_status(run).state == "failed"
        assert runs.read_status(run).detail == "Another process of the run ended; output.log has its last lines."
        assert f"Signal 9 (SIGKILL) received by PID {follower.pid}" in run.log_path.read_text()
        reached = runs.read_status(run).step
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
    again = _start_two(_main, run)
    _wait_for(run, lambda: runs.read_status(run).step > reached)
    runs.send_request(run, "stop")
    _wait_for_both(again)
    assert runs.read_status(run).state == "stopped", runs.log_tail(run, 200)
    records = runs.read_events(run)[0]
    assert [record.seq for record in records] == [*range(1, len(records) + 1)]
    steps = [record.event.step for record in records if isinstance(record.event, Stepped)]
    assert steps[-1] == runs.read_status(run).step > reached
    assert (run.delta_path / "delta.safetensors").is_file()
