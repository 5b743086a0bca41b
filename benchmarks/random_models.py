"""Models of random weights, made where they are to lie: nothing is downloaded, and no second copy is ever there.

A config.json is enough. Numbers are drawn as transformers draws those of a new model; over NF4 one matrix at a time is
drawn and quantised, so that a model of 33 billion parameters is made in little more than it takes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models import describe_model
from engine.presets import known_config
from engine.rng import random_state_kept
from engine.sparse.base_weight import keep_packing, packed_tensors
from engine.spec import RunSpec

STD = 0.02  # of an NF4 matrix before it is quantised; transformers' default for the others


@contextmanager
def config_folder(model: str, changes: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Make a folder with the config.json of a model that the presets name, `changes` put in; yield its path."""
    path = known_config(model)
    assert path is not None, f"no preset names {model}"
    with TemporaryDirectory() as folder:
        body = json.loads(path.read_text(encoding="utf-8")) | dict(changes or {})
        Path(folder, "config.json").write_text(json.dumps(body), encoding="utf-8")
        yield folder


def random_model(spec: RunSpec, device: torch.device) -> PreTrainedModel:
    """Return what `load_model` gives, with weights drawn from `spec.seed`: the folder needs a config.json only.

    Raises:
        ModelError: transformers cannot build the model.
    """
    model = describe_model(spec, device)
    with random_state_kept(device), torch.no_grad():
        torch.manual_seed(spec.seed)
        made: dict[int, nn.Parameter] = {}  # tied weights are one
        module: Any
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                new = made.get(id(parameter))
                made[id(parameter)] = new = _made(parameter, device) if new is None else new
                setattr(module, name, new)
                if hasattr(module, "quant_state"):  # a layer of bitsandbytes keeps that of its weight as well
                    module.quant_state = module.weight.quant_state
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
        model.initialize_weights()
    keep_packing(model)
    model.eval()
    return model


def _made(parameter: nn.Parameter, device: torch.device) -> Any:
    """Return a parameter on `device` in the stead of one that has no numbers; those of NF4 have theirs already."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    from bitsandbytes.nn.modules import Params4bit

    numbers = torch.empty(state.shape, dtype=state.dtype, device=device).normal_(std=STD)
    packed: Any = Params4bit(numbers, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
    packed._is_hf_initialized = True
    return packed


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once, with what NF4 keeps beside them."""
    parts: list[Tensor] = [part for parameter in model.parameters() for part in packed_tensors(parameter)]
    return sum(part.nbytes for part in parts)
