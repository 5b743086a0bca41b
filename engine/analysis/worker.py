"""The process that measures a model for an analysis: reads request.json, answers with JSON lines on stdout.

`{"done": n, "total": n, "what": words}` while it works, then `{"result": ...}` or `{"error": sentence}`.
"""

import itertools
import json
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.analysis.gradients import measure_gradients
from engine.analysis.landscape import measure_landscape
from engine.analysis.results import GradientsResult
from engine.analysis.twin import random_twin
from engine.data.batches import Batch, evaluation_batches, prepare_data
from engine.data.steps import step_batches
from engine.errors import EngineError
from engine.models import device_of, load_model, load_tokenizer
from engine.spec import RunSpec
from engine.spec_io import parse_spec


def main(folder: Path) -> int:
    """Do what request.json in `folder` asks; return the process's exit status, 0 or 1."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    measures = {"gradients": _gradients, "landscape": _landscape}
    try:
        with redirect_stdout(sys.stderr):  # libraries that print do not break a line
            spec = parse_spec(request["spec"])
            result = measures[request["kind"]](spec, request["settings"])
        _say(result=result)
        return 0
    except EngineError as error:
        _say(error=str(error))
    except torch.OutOfMemoryError:
        _say(error="The device ran out of memory. Lower micro_batch_size or sequence_length, or set device=cpu.")
    except Exception:
        traceback.print_exc()  # into output.log
    return 1


def _say(**body: Any) -> None:
    assert sys.__stdout__ is not None
    print(json.dumps(body, allow_nan=False), file=sys.__stdout__, flush=True)


def _load(spec: RunSpec) -> PreTrainedModel:
    return load_model(spec, device_of(spec.device))


def _gradients(spec: RunSpec, settings: dict[str, int]) -> dict[str, Any]:
    data, wanted = prepare_data(spec, load_tokenizer(spec)), settings["batches"]
    micro_batches = (batch for step in itertools.count(1) for batch in step_batches(data.training, spec, step))
    batches: list[Batch] = list(itertools.islice(micro_batches, wanted))
    model = _load(spec)
    twin = random_twin(model, spec.seed)
    sides = []
    for number, (side, words) in enumerate(((model, "the pretrained model"), (twin, "its random twin"))):

        def progress(done: int, before: int = number * wanted, words: str = words) -> None:
            _say(done=before + done, total=2 * wanted, what=f"gradients of {words}")

        sides.append(measure_gradients(side, spec.targets, batches, progress))
    return asdict(GradientsResult(*sides))


def _landscape(spec: RunSpec, settings: dict[str, int]) -> dict[str, Any]:
    data = prepare_data(spec, load_tokenizer(spec))
    batches = list(evaluation_batches(data.training[: settings["rows"]], spec))
    model = _load(spec)
    result = measure_landscape(
        model,
        random_twin(model, spec.seed),
        batches,
        line=settings["line"],
        grid=settings["grid"],
        seed=spec.seed,
        progress=lambda done, total: _say(done=done, total=total, what="losses"),
    )
    return asdict(result)
