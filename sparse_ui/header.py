"""The line that never leaves the screen: where the run stands, the device, its memory."""

from engine import hardware, runs
from engine.errors import EngineError
from engine.events import RunState
from engine.runs import Run, RunStatus
from engine.units import format_duration
from sparse_ui import cards
from sparse_ui.context import AppContext


def status_words(status: RunStatus) -> str:
    """Return where a run stands: `Training · step 412 of 1,560 · 1 h 34 min left`."""
    steps = f"step {status.step:,} of {status.total_steps:,}"
    match status.state:
        case "queued":
            return "Queued · waits for the device" if status.detail else "Starting"
        case "preparing":
            return f"Preparing · {status.detail}" if status.detail else "Preparing"
        case "running":
            left = f" · {format_duration(status.remaining_s)} left" if status.remaining_s is not None else ""
            return f"Training · {steps}{left}" if status.total_steps else "Training"
        case "stopping":
            return f"Stopping · {steps}" if status.total_steps else "Stopping"
        case "finished":
            return f"Finished · {status.step:,} steps"
        case "stopped":
            return f"Stopped · {steps}" if status.total_steps else "Stopped before the first step"
        case "failed":
            return f"Failed · {steps}" if status.total_steps else "Failed before the first step"


def header_html(context: AppContext) -> str:
    """Return the header as it stands now."""
    run = context.live_run()
    state: RunState | None = None
    words, asked = "Idle", "auto"
    if run is not None:
        status = runs.read_status(run)
        state, words, asked = status.state, status_words(status), _device_of(run)
    try:
        device = hardware.resolve_device(asked)
    except EngineError:
        device = hardware.resolve_device("auto")
    degrees = [gpu.temperature_celsius for gpu in hardware.list_gpus() if f"cuda:{gpu.index}" == device.name]
    label = f"{device.label} · {degrees[0]} °C" if degrees and degrees[0] is not None else device.label
    in_use = device.total_bytes - device.free_bytes
    of_run = min(in_use, _memory_of(context, run)) if run is not None else 0
    parts = [("this run", of_run, "p1"), ("other programs", in_use - of_run, "p6")]
    return cards.header(state, words, label, parts, device.total_bytes)


def _memory_of(context: AppContext, run: Run) -> int:
    try:
        last = context.reader.read(run).last
    except EngineError:
        return 0
    return last.memory_bytes if last is not None else 0


def _device_of(run: Run) -> str:
    try:
        return runs.read_spec(run).device
    except EngineError:
        return "auto"
