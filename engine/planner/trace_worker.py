"""The process that traces, and counts tokens: requests and answers are JSON lines. It keeps torch loaded."""

import json
import sys
from dataclasses import replace
from typing import Any, TextIO

import torch

from engine.data.row_counts import count_rows
from engine.errors import DatasetError, EngineError, ModelError
from engine.hardware import Device
from engine.models import describe_classifier, describe_model, load_tokenizer
from engine.planner.allocator import device_events, replay_and_least_limit
from engine.planner.headers import Shape
from engine.planner.ledger import ROUNDING_BYTES, Ledger, add_up
from engine.planner.row_lengths import keep_lengths, keep_uncounted
from engine.planner.shape import read_shape
from engine.planner.trace import no_garbage, trace_events
from engine.planner.traced import Traced, keep, keep_failure, traced
from engine.spec import RunSpec

TOKENISED_ROWS = 10_000  # of a dataset, at most, for a plan: some seconds


def main(requests: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> int:
    """Answer requests until their stream ends; return the process's exit status."""
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in requests:
        request = json.loads(line)
        answer = _count(request) if "device" not in request else _answer(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    spec, device = RunSpec(**request["spec"]), Device(**request["device"])
    try:
        found = traced(spec, device)
        if found is None:
            found = trace_spec(spec, device)
            if not read_shape(spec.model, spec.model_revision, spec.task).exact:
                found = replace(found, tensors=_tensors_of(spec), spec=spec.model_dump(mode="json"))
            keep(spec, device, found)
        return found.to_dict()
    except ModelError as error:
        keep_failure(spec, device, str(error), refused=True)
        return {"refused": str(error)}
    except EngineError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a model class that nobody tried raises on tensors without numbers
        first = str(error).strip().partition("\n")[0]
        why = f"A step of its code cannot be traced ({type(error).__name__}: {first}); a run may fail as well."
        keep_failure(spec, device, why)
        return {"error": why}


def _count(request: dict[str, Any]) -> dict[str, Any]:
    """Count the rows of a dataset, or keep why that cannot be done."""
    spec = RunSpec(**request["spec"])
    try:
        lengths = count_rows(spec, load_tokenizer(spec), TOKENISED_ROWS)
    except EngineError as error:
        passes = not isinstance(error, DatasetError | ModelError)  # of what lies in files
        keep_uncounted(spec, str(error), refused=isinstance(error, DatasetError), passes=passes)
    else:
        keep_lengths(spec, lengths)
    return {}


def _tensors_of(spec: RunSpec) -> dict[str, Shape]:
    """Return the parameters of the model's class, name to shape."""
    dense, device = spec.model_copy(update={"quantization": "none"}), torch.device("cpu")
    model = describe_model(dense, device) if spec.task == "causal" else describe_classifier(dense, device)[0]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def trace_spec(spec: RunSpec, device: Device) -> Traced:
    """Trace `spec`, and replay the allocator where the device has one that caches."""
    with no_garbage():
        ledger = trace_events(spec, device)
        if device.is_cpu:
            figures = add_up(ledger, 0, host_apart=False)
            peak = figures.peak.total
            return Traced(figures, peak, peak, peak)
        return replayed(ledger)


def replayed(ledger: Ledger) -> Traced:
    """Return what a trace for a GPU adds up to, with the allocator's figures."""
    reserved, least = replay_and_least_limit(device_events(ledger))
    least = min(least, reserved.reserved_bytes)  # what is reserved is enough
    return Traced(add_up(ledger, ROUNDING_BYTES), reserved.allocated_bytes, reserved.reserved_bytes, least)
