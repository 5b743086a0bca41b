"""The probe: a few steps of the demo on a device, in a process of their own, for what no formula can know.

What the process (CPU) or the CUDA context takes before the first tensor, what the libraries keep beside the closed
forms in a step, and how many operations a second the device does on a model of the demo's width.
"""

import statistics
from dataclasses import replace

import peft  # noqa: F401
import psutil
import torch

import engine.train.worker  # noqa: F401 - what a worker has loaded is part of what is measured, for an adapter as well
from engine.data.batches import prepare_data
from engine.events import Event, Stepped
from engine.hardware import Device, list_gpus, resolve_device
from engine.models import device_of, load_model, load_tokenizer, resolve_dtype
from engine.planner.calibration import Rate, store_bytes, store_rate
from engine.planner.plan import make_plan
from engine.presets import load_preset
from engine.sparse.gradient_costs import forget_costs
from engine.train.control import NeverAsked
from engine.train.loop import Trainer
from engine.train.memory import MemoryMeter
from engine.train.preflight import longest_rows
from engine.train.tuning import start_tuning

_STEPS = 8
_WARM_STEPS = 2  # the first ones choose entries and fill caches


def measure(name: str) -> None:
    """Measure the device that `name` means, as in a spec, and keep what was found.

    Raises:
        DeviceError: it is not here.
    """
    found = resolve_device(name)
    device = device_of(name)
    changes = {"max_steps": _STEPS, "device": found.name, "dtype": "auto", "probe_interval": 0}
    spec = load_preset("demo").model_copy(update={**changes, "evaluation_interval": 0})
    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    data = replace(data, training=longest_rows(data.training, spec.micro_batch_size))
    forget_costs(device)  # which the busy computer of a first run may have spoilt
    free_bytes = found.free_bytes
    if not found.is_cpu:
        torch.cuda.set_device(device)
    model = load_model(spec, device)
    plan = make_plan(spec, with_remedies=False, lengths=data.row_lengths)
    context_bytes = _taken_bytes(found, free_bytes, plan.parts["parameters"])
    events: list[Event] = []
    tuning = start_tuning(model, spec)
    meter = MemoryMeter(device)
    optimizer = tuning.make_optimizer()
    Trainer(spec, model, tokenizer, data, tuning, optimizer, events.append, NeverAsked(), lambda _: None, meter).run()
    tensors = sum(size for part, size in plan.parts.items() if part not in ("context", "workspace"))
    store_bytes(found, context_bytes, max(0, meter.peak_bytes() - tensors - (context_bytes if found.is_cpu else 0)))
    rates = [event.tokens_per_s for event in events if isinstance(event, Stepped)][_WARM_STEPS:]
    dtype = str(resolve_dtype(spec.dtype, device)).removeprefix("torch.")
    speed = statistics.median(rates) * plan.flops / plan.tokens
    store_rate(found, Rate(dtype, model.config.hidden_size, speed))


def _taken_bytes(device: Device, free_before: int, parameters: int) -> int:
    """Return what is taken beside the model: resident memory of this process, or the context that came with CUDA."""
    if device.is_cpu:
        return int(psutil.Process().memory_info().rss) - parameters
    index = int(device.name.partition(":")[2])
    reserved = int(torch.cuda.memory_reserved(device.name))
    return max(0, free_before - list_gpus()[index].free_bytes - reserved)
