"""The process that trains one run: locks, loads, trains, saves, and says how it went in the run folder."""

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import filelock
import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.batches import PreparedData, prepare_data
from engine.data.labels import Labels
from engine.errors import EngineError, TrainingError
from engine.events import (
    Checkpointed,
    Evaluated,
    Event,
    EventWriter,
    ModelLoaded,
    RunState,
    StateChanged,
    Stepped,
    Warned,
)
from engine.hardware import resolve_device
from engine.models import load_classifier, load_model, load_tokenizer, resolve_dtype
from engine.planner.plan import Plan, make_plan, require_fit
from engine.runs import (
    Run,
    RunStatus,
    latest_checkpoint,
    read_events,
    read_plan,
    read_spec,
    read_status,
    run_lock,
    take_request,
    write_json,
    write_status,
)
from engine.sparse.base_weight import base_weights
from engine.spec import RunSpec
from engine.train.checkpoint import load_checkpoint, save_checkpoint
from engine.train.head import HeadedTuning
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter, hold_to_budget
from engine.train.preflight import Preflight, is_out_of_memory, longest_row
from engine.train.report import write_report
from engine.train.tuning import Tuning, start_tuning

Start = Callable[[RunSpec], Tuning]
LOCK_TIMEOUT_S = 5.0  # a look at the lock by `runs.has_worker` is over in far less
QUEUE_POLL_S = 0.5
STATUS_INTERVAL_S = 0.3


class Journal:
    """Writes what happens into the run folder, and takes requests from it."""

    def __init__(self, run: Run) -> None:
        """Open the event file of `run` and claim its status."""
        process = psutil.Process()
        self.run = run
        self._events = EventWriter(run.events_path)
        before = read_status(run)  # a run that goes on is where it was until its first step
        self._status = RunStatus(
            "queued",
            pid=process.pid,
            create_time=process.create_time(),
            step=before.step,
            total_steps=before.total_steps,
        )
        self._stop = False
        self._written_s = 0.0

    def emit(self, event: Event) -> None:
        """Append an event; the status follows it."""
        self._events.write(event)
        status = replace(self._status, seq=self._events.seq)
        if isinstance(event, StateChanged):
            status = replace(status, state=event.state, detail=event.detail)
        if isinstance(event, Stepped):
            status = replace(status, step=event.step, total_steps=event.total_steps, remaining_s=event.remaining_s)
        self._status = status
        if not isinstance(event, Stepped) or time.monotonic() - self._written_s > STATUS_INTERVAL_S:
            write_status(self.run, status)
            self._written_s = time.monotonic()

    def state(self, state: RunState, detail: str = "") -> None:
        """Enter a state."""
        self.emit(StateChanged(state, detail))

    def request_stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Stop after the step in progress; a signal handler."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the run is to end; once true it stays so."""
        self._stop = self._stop or take_request(self.run, "stop")
        return self._stop

    def checkpoint_requested(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        return take_request(self.run, "checkpoint")


def main(run: Run) -> int:
    """Train `run` to its end, from its newest checkpoint if it has one; return the process's exit status.

    0: finished or stopped as asked. 1: failed, with the sentence in status.json and events.jsonl.
    """
    lock = run_lock(run)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        print(f"Run {run.id} has a worker already.", flush=True)
        return 1
    journal = Journal(run)
    signal.signal(signal.SIGTERM, journal.request_stop)
    signal.signal(signal.SIGINT, journal.request_stop)
    try:
        with _device_turn(run, journal) as my_turn:
            if my_turn:
                _work(run, journal)
            else:
                journal.state("stopped", "Stopped while it was queued.")
        return 0
    except Exception as error:
        traceback.print_exc()
        journal.state("failed", _sentence(error))
        return 1
    finally:
        lock.release()


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
def _device_turn(run: Run, journal: Journal) -> Iterator[bool]:
    """Wait as `queued` until no other run of the folder uses the device; yield False where a stop came first."""
    device = resolve_device(read_spec(run).device)
    turn = filelock.FileLock(run.path.parent / f".{device.name.replace(':', '-')}.lock")
    waiting = False
    while True:
        try:
            turn.acquire(blocking=False)
            break
        except filelock.Timeout:
            if not waiting:
                journal.state("queued", f"Waiting for another run on {device.label} to end.")
                waiting = True
            if journal.stop_requested():
                yield False
                return
            time.sleep(QUEUE_POLL_S)
    try:
        yield True
    finally:
        turn.release()


def _work(run: Run, journal: Journal) -> None:
    spec = read_spec(run)
    journal.state("preparing", "Reading the dataset.")
    require_fit(make_plan(spec))
    device = torch.device(resolve_device(spec.device).name)
    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    journal.emit(data.summary)
    spec = _as_before(run, spec)
    plan = make_plan(spec, longest_row=longest_row(data))  # no batch is longer, so the bar is true
    spec = plan.settle(spec)
    write_json(run.path / "plan.json", plan.to_dict())
    hold_to_budget(plan, device)
    torch.manual_seed(spec.seed)
    trainer = _build(run, journal, Loaded(spec, tokenizer, data, plan, device))
    base = _base_figures(run, trainer, journal)
    if base is None:
        journal.state("stopped", "Stopped before the first step.")
        return
    journal.state("running")
    try:
        reached_end = trainer.run()
    except TrainingError:  # the numbers are beyond use; an older checkpoint may be good
        raise
    except Exception:
        _keep_what_was_learnt(run, trainer)
        raise
    if not reached_end:
        journal.state("stopping", "Saving.")
    if trainer.step:
        trainer.save(trainer)
        trainer.tuning.save_result(run.delta_path)
    tuned = trainer.evaluate(spec.exact_match_rows, scored=True) if reached_end else None
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


def _build(run: Run, journal: Journal, loaded: Loaded) -> Trainer:
    spec, device, data = loaded.spec, loaded.device, loaded.data
    journal.state("preparing", "Loading the model.")
    begun = time.monotonic()
    model, start = _load(spec, device, data.labels)
    loading_s = time.monotonic() - begun
    num_parameters = sum(weight.numel() for weight in base_weights(model).values())
    checkpoint, tried_bytes = latest_checkpoint(run), 0
    if spec.preflight and checkpoint is None:
        journal.state("preparing", "Trying one step at the longest batch.")
        tried = Preflight(spec, model, loaded.tokenizer, data, loaded.plan, run.path, start).run()
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
        path = save_checkpoint(run.checkpoints_path, tuning, optimizer, trainer.progress())
        journal.emit(Checkpointed(trainer.step, str(path.relative_to(run.path))))

    meter = MemoryMeter(device, tried_bytes)
    trainer = Trainer(spec, model, loaded.tokenizer, data, tuning, optimizer, journal.emit, journal, save, meter)
    if checkpoint is not None:
        trainer.go_on_from(load_checkpoint(checkpoint, tuning, optimizer))
        journal.emit(Warned(f"Going on from the checkpoint of step {trainer.step}."))
    return trainer


def _base_figures(run: Run, trainer: Trainer, journal: Journal) -> Evaluated | None:
    """Return the figures of the untuned base, from the run's events where an earlier session computed them.

    None where a stop came first.
    """
    for record in read_events(run)[0]:
        if isinstance(record.event, Evaluated) and record.event.step == 0:
            return record.event
    journal.state("preparing", "Evaluating the base model.")
    return trainer.evaluate(trainer.spec.exact_match_rows, scored=True)


def _keep_what_was_learnt(run: Run, trainer: Trainer) -> None:
    """Save the last whole step of a run that fails, as far as the failure allows."""
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.step == 0 or trainer.tuning.selecting:
        return
    try:
        trainer.save(trainer)
        trainer.tuning.save_result(run.delta_path)
    except (OSError, RuntimeError):
        traceback.print_exc()
