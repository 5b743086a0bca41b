"""The process that trains one run: locks, loads, trains, saves, and says how it went in the run folder."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import filelock
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.batches import PreparedData, prepare_data
from engine.data.labels import Labels
from engine.errors import DatasetError, EngineError, TrainingError
from engine.events import Checkpointed, Evaluated, ModelLoaded, RunState, Warned
from engine.hardware import resolve_device
from engine.models import device_of, load_classifier, load_model, load_tokenizer, resolve_dtype
from engine.planner.plan import Plan, make_plan, require_fit
from engine.planner.row_lengths import keep_lengths, keep_uncounted
from engine.runs import (
    Run,
    device_lock,
    latest_checkpoint,
    read_events,
    read_plan,
    read_spec,
    run_lock,
    take_lock,
    write_json,
)
from engine.sparse.base_weight import base_weights
from engine.sparse.peers import ALONE, PeerLostError, Peers
from engine.spec import RunSpec
from engine.tracer import plan_by_trace
from engine.train.checkpoint import gather_rng, load_checkpoint, save_checkpoint
from engine.train.head import HeadedTuning
from engine.train.journal import Journal, Listener
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter, hold_to_budget
from engine.train.preflight import Preflight, is_out_of_memory
from engine.train.report import write_report
from engine.train.tuning import Tuning, start_tuning

Start = Callable[[RunSpec], Tuning]
LOCK_TIMEOUT_S = 5.0  # a look at the lock by `runs.has_worker` is over in far less
QUEUE_POLL_S = 0.5


def main(run: Run) -> int:
    """Train `run` to its end, from its newest checkpoint if it has one; return the process's exit status.

    Of several processes the first one owns the run folder, and the others follow it.

    0: finished or stopped as asked. 1: failed, with the sentence in status.json and events.jsonl.
    """
    if _rank(run):
        return _follow(run)
    lock = run_lock(run)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        print(f"Run {run.id} has a worker already.", flush=True)
        return 1
    journal = Journal(run)
    signal.signal(signal.SIGTERM, journal.request_stop)
    signal.signal(signal.SIGINT, journal.request_stop)
    peers = ALONE
    try:
        spec = read_spec(run)
        peers = Peers.join(spec.num_processes, on_cpu=resolve_device(spec.device).is_cpu)
        with _device_turn(run, spec, journal) as my_turn:
            if peers.from_first(my_turn):
                _work(run, spec, journal, peers)
            else:
                journal.state("stopped", "Stopped while it was queued.")
        peers.leave()
        return 0
    except Exception as error:
        traceback.print_exc()
        said = peers.last_word() if isinstance(error, PeerLostError) else ""
        journal.state("failed", said or _sentence(error))
        return 1
    finally:
        lock.release()


def _rank(run: Run) -> int:
    """Return the number of this process among those of the run; a spec that cannot be read is for the first to say."""
    try:
        return int(os.environ["RANK"]) if read_spec(run).num_processes > 1 else 0
    except (EngineError, KeyError):
        return 0


def _follow(run: Run) -> int:
    """Do what the first process does, but for what it alone says and writes. It decides when to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    peers = ALONE
    try:
        spec = read_spec(run)
        peers = Peers.join(spec.num_processes, on_cpu=resolve_device(spec.device).is_cpu)
        if peers.from_first(False):
            _work(run, spec, Listener(), peers)
        peers.leave()
        return 0
    except Exception as error:
        traceback.print_exc()
        if not isinstance(error, PeerLostError):
            peers.leave_word(_sentence(error))
        return 1


def own_spec(spec: RunSpec, rank: int) -> RunSpec:
    """Return `spec` with the device of process `rank`: of several on GPUs each has a card of its own."""
    if spec.num_processes == 1 or resolve_device(spec.device).is_cpu:
        return spec
    return spec.model_copy(update={"device": f"cuda:{rank}"})


def _sentence(error: Exception) -> str:
    if isinstance(error, EngineError):
        return str(error)
    if is_out_of_memory(error):
        return (
            "The device ran out of memory. Lower micro_batch_size or sequence_length, "
            "or set gradient_checkpointing=true."
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"The worker met an unexpected error ({type(error).__name__}: {first}). output.log has the details."


@contextmanager
def _device_turn(run: Run, spec: RunSpec, journal: Journal) -> Iterator[bool]:
    """Wait as `queued` until nothing else of the folder uses the devices; False if a stop came first."""
    device = resolve_device(own_spec(spec, 0).device)
    count = 1 if device.is_cpu else spec.num_processes
    names = [device.name] if count == 1 else [f"cuda:{rank}" for rank in range(count)]
    waiting = False
    with ExitStack() as turns:
        for name in names:  # in this order by everyone, so that no two wait for each other
            turn = device_lock(run.path.parent, name)
            while not take_lock(turn):
                if not waiting:
                    journal.state(
                        "queued", f"Waiting for another run, a chat or a measurement on {device.label} to end."
                    )
                    waiting = True
                if journal.stop_requested():
                    yield False
                    return
                time.sleep(QUEUE_POLL_S)
            turns.callback(turn.release)
        yield True


def _work(run: Run, spec: RunSpec, journal: Journal | Listener, peers: Peers) -> None:
    spec = own_spec(spec, peers.rank)
    journal.state("preparing", "Reading the dataset.")
    device = device_of(spec.device)
    with peers.one_after_the_first():
        tokenizer = load_tokenizer(spec)
        data = _prepared(spec, tokenizer)
    journal.emit(data.summary)
    spec = _as_before(run, spec)
    lengths = data.row_lengths  # no batch is longer, so the bar is true
    plan = plan_by_trace(spec, lengths=lengths) if peers.is_first else make_plan(spec, lengths=lengths)
    if peers.is_first:
        keep_lengths(spec, lengths)
        require_fit(plan)
        write_json(run.path / "plan.json", plan.to_dict())
    spec = peers.from_first(plan.settle(spec))  # what is free differs from card to card
    if device.type == "cuda":  # for libraries and random states that ask for the current one
        # Not before the plan: that takes memory, which the driver of a container cannot say to be this process's own.
        torch.cuda.set_device(device)
    hold_to_budget(plan, device)
    torch.manual_seed(spec.seed + peers.rank)
    trainer = _build(run, journal, Loaded(spec, tokenizer, data, plan, device), peers)
    base = _base_figures(run, trainer, journal) if peers.is_first else None
    if not peers.from_first(base is not None):
        journal.state("stopped", "Stopped before the first step.")
        return
    journal.state("running")
    try:
        reached_end = trainer.run()
    except TrainingError:  # the numbers are beyond use; an older checkpoint may be good
        raise
    except Exception:
        if peers.is_first:
            _keep_what_was_learnt(run, trainer, journal)
        raise
    if not reached_end:
        journal.state("stopping", "Saving.")
    if trainer.step:
        trainer.save(trainer)
    if base is not None:
        _conclude(run, trainer, journal, base, plan, reached_end)


def _prepared(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Return the dataset tokenised. That there is nothing to train on is kept, for `workers` to say before a run."""
    try:
        return prepare_data(spec, tokenizer)
    except DatasetError as error:
        keep_uncounted(spec, str(error), refused=True)
        raise


def _conclude(
    run: Run, trainer: Trainer, journal: Journal | Listener, base: Evaluated, plan: Plan, reached_end: bool
) -> None:
    """Write and judge the result; the first process does."""
    if trainer.step:
        trainer.tuning.save_result(run.delta_path)
    tuned = trainer.evaluate(trainer.spec.exact_match_rows, scored=True) if reached_end else None
    # Stopped while it evaluated the result, a run goes on from its last step to that evaluation.
    state: RunState = "finished" if tuned is not None else "stopped"
    write_report(run, trainer, base, tuned, plan, state)
    journal.state(state)


def _as_before(run: Run, spec: RunSpec) -> RunSpec:
    """Return the spec with what the plan of an earlier session decided: what is free now must not change the bits."""
    before = read_plan(run) if latest_checkpoint(run) is not None else {}
    return spec.model_copy(update={name: before[name] for name in ("recompute", "recompute_blocks") if name in before})


@dataclass(frozen=True)
class Loaded:
    """What a run has before its model."""

    spec: RunSpec
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    plan: Plan
    device: torch.device


def _load(spec: RunSpec, device: torch.device, labels: Labels | None) -> tuple[PreTrainedModel, Start]:
    """Return the base model, and what makes it trainable."""
    if labels is None:
        model = load_model(spec, device)
        return model, lambda spec: start_tuning(model, spec)
    model, head = load_classifier(spec, device, labels.names)
    return model, lambda spec: HeadedTuning(start_tuning(model, spec, head), model, head, labels.names, spec)


def _build(run: Run, journal: Journal | Listener, loaded: Loaded, peers: Peers) -> Trainer:
    spec, device, data = loaded.spec, loaded.device, loaded.data
    journal.state("preparing", "Loading the model.")
    begun = time.monotonic()
    model, start = _load(spec, device, data.labels)
    loading_s = time.monotonic() - begun
    num_parameters = sum(weight.numel() for weight in base_weights(model).values())
    checkpoint, tried_bytes = latest_checkpoint(run), 0
    if spec.preflight and checkpoint is None:
        journal.state("preparing", "Trying one step at the longest batch.")
        tried = Preflight(spec, model, loaded.tokenizer, data, loaded.plan, run.path, start, peers).run()
        journal.emit(tried)
        tried_bytes = tried.peak_bytes
    tuning = start(spec)
    journal.emit(
        ModelLoaded(
            num_parameters,
            tuning.num_targets,
            tuning.target_numel,
            tuning.num_active,
            str(device),
            str(resolve_dtype(spec.dtype, device)).removeprefix("torch."),
            loading_s,
            tuning.head_numel if isinstance(tuning, HeadedTuning) else 0,
        )
    )
    optimizer = tuning.make_optimizer()

    def save(trainer: Trainer) -> None:
        others = gather_rng(peers)
        if peers.is_first:
            _save(run, trainer, journal, others)

    meter = MemoryMeter(device, tried_bytes)
    trainer = Trainer(spec, model, loaded.tokenizer, data, tuning, optimizer, journal.emit, journal, save, meter, peers)
    if checkpoint is not None:
        trainer.go_on_from(load_checkpoint(checkpoint, tuning, optimizer, peers.rank))
        journal.emit(Warned(f"Going on from the checkpoint of step {trainer.step}."))
    return trainer


def _save(run: Run, trainer: Trainer, journal: Journal | Listener, others: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, with the random states of the `others`, and say so."""
    path = save_checkpoint(run.checkpoints_path, trainer.tuning, trainer.optimizer, trainer.progress(), others)
    journal.emit(Checkpointed(trainer.step, str(path.relative_to(run.path))))


def _base_figures(run: Run, trainer: Trainer, journal: Journal | Listener) -> Evaluated | None:
    """Return the figures of the untuned base, from the run's events where an earlier session computed them.

    None where a stop came first.
    """
    for record in read_events(run)[0]:
        if isinstance(record.event, Evaluated) and record.event.step == 0:
            return record.event
    journal.state("preparing", "Evaluating the base model.")
    return trainer.evaluate(trainer.spec.exact_match_rows, scored=True)


def _keep_what_was_learnt(run: Run, trainer: Trainer, journal: Journal | Listener) -> None:
    """Save the last whole step of a run that fails, as far as the failure allows."""
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.step == 0 or trainer.tuning.selecting:
        return
    try:
        if trainer.peers.count == 1:
            trainer.settle()
        trainer.log.require_finite()
        _save(run, trainer, journal, {})
        trainer.tuning.save_result(run.delta_path)
    except (OSError, RuntimeError, TrainingError):
        traceback.print_exc()
