"""The base model and its tokenizer through transformers, from a bundled name, a local folder or the Hub."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from engine.errors import ModelError
from engine.hub import hub_online, require_hub
from engine.planner.shape import require_weights, resolve_model
from engine.sparse.base_weight import describe_in_nf4, keep_packing, nf4_config
from engine.spec import RunSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a spec's `dtype`; auto is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def load_model(spec: RunSpec, device: torch.device) -> PreTrainedModel:
    """Return the base model in evaluation mode on `device`, in the dtype and with the attention of the spec.

    Raises:
        ModelError: it is not there, has no weights, or transformers cannot build it.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    require_weights(spec.model, spec.model_revision)
    dtype = resolve_dtype(spec.dtype, device)
    quantised = {"quantization_config": nf4_config(dtype), "device_map": {"": device}}
    model = _load(
        AutoModelForCausalLM,
        spec,
        dtype=dtype,
        attn_implementation=spec.attention,
        use_safetensors=True,
        **(quantised if spec.quantization == "nf4" else {}),
    )
    keep_packing(model)
    placed: PreTrainedModel = (model if spec.quantization == "nf4" else model.to(device)).eval()
    return placed


def describe_model(spec: RunSpec, device: torch.device) -> PreTrainedModel:
    """Return the model that `load_model` would give, on the meta device: its tensors have sizes and no numbers.

    Args:
        spec: its model needs a config.json, no weights.
        device: that the model would be loaded to.

    Raises:
        ModelError: transformers cannot build it.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    config = _load(AutoConfig, spec)
    dtype = resolve_dtype(spec.dtype, device)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=spec.attention)
    model.tie_weights()  # with the first numbers left out, so is this
    if spec.quantization == "nf4":
        describe_in_nf4(model, dtype)
    described: PreTrainedModel = model.eval()
    return described


def load_tokenizer(spec: RunSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        ModelError: the model has none that can be read.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, spec)
    return tokenizer


def _load(loader: Any, spec: RunSpec, **options: Any) -> Any:
    source = resolve_model(spec.model, spec.model_revision)
    local = isinstance(source, Path)
    online = not local and hub_online()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if online else "1")
    transformers_logging.disable_progress_bar()
    try:
        return loader.from_pretrained(
            source, revision=spec.model_revision or "main", local_files_only=not online, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if not local and not online:
            require_hub(f"model {spec.model!r}")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if loader is AutoTokenizer:
            raise ModelError(
                f"Model {spec.model!r} has no tokenizer that can be loaded. Put its tokenizer.json and "
                "tokenizer_config.json into the folder."
            ) from error
        raise ModelError(f"The weights of {spec.model!r} cannot be loaded: {first}") from error
