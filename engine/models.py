"""The base model and its tokenizer through transformers, from a bundled name, a local folder or the Hub."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from engine.data.token_ids import padding_id, rows_of
from engine.errors import DeviceError, ModelError
from engine.hardware import resolve_device
from engine.hub import hub_online, require_hub
from engine.planner.encoders import HEAD_MODULES
from engine.planner.families import LANGUAGE_MODEL
from engine.planner.shape import require_weights, resolve_model
from engine.rng import random_state_kept
from engine.sparse.base_weight import describe_in_nf4, keep_packing, nf4_config
from engine.spec import RunSpec
from engine.targets import layer_number

_TOKENIZER_FILES = ("*token*", "vocab.*", "*.model")
_NO_TOKENIZER = (
    "Model {model!r} has no tokenizer that can be loaded. "
    "Put its tokenizer.json and tokenizer_config.json into the folder."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a spec's `dtype`; auto is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def device_of(name: str) -> torch.device:
    """Return the device that a spec's `device` means, for PyTorch.

    Raises:
        DeviceError: it is not here, or this PyTorch cannot use it.
    """
    found = resolve_device(name)
    if not found.is_cpu and not torch.cuda.is_available():
        cuda = torch.version.cuda
        remedy = (
            f"Its CUDA {cuda} needs a newer driver: update that" if cuda else "It lacks CUDA: install a build that has"
        )
        raise DeviceError(f"PyTorch {torch.__version__} cannot use {found.label}. {remedy}, or set device=cpu.")
    return torch.device(found.name)


def load_model(spec: RunSpec, device: torch.device) -> PreTrainedModel:
    """Return the base model in evaluation mode on `device`, in the dtype and with the attention of the spec.

    Raises:
        ModelError: it is not there, has no weights, or transformers cannot build it.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    alone = _language_model_alone(spec)
    attention = _attention(MODEL_FOR_CAUSAL_LM_MAPPING, alone.get("config") or _load(AutoConfig, spec), spec)
    model = _load(AutoModelForCausalLM, spec, attn_implementation=attention, **_options(spec, device), **alone)
    if alone:  # it is saved under its own names: transformers 5.23 would turn `key_mapping` round, and fails at it
        vars(model).pop("_weight_conversions", None)
    return _placed(model, spec, device)


def load_classifier(
    spec: RunSpec, device: torch.device, labels: Sequence[str]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the base model with a head for `labels`, as `load_model` does, and the names of the head's parameters.

    The head is what the checkpoint lacks (classifier, score, a pooler without weights) and any classifier that it has.
    What is made anew is drawn from `spec.seed`, and nothing else of the random state is touched.

    Args:
        spec: of the run.
        device: where the model goes.
        labels: by class number; empty for a regression.

    Raises:
        ModelError: it is not there, has no weights, or transformers knows no classification by such a model.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    config = _load(AutoConfig, spec)
    # Before anything is built of it: the checkpoint may be that of another task.
    config.problem_type, config.num_labels = "single_label_classification" if labels else "regression", len(labels) or 1
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {word: at for at, word in enumerate(labels)}
    options: dict[str, Any] = {"config": config, "ignore_mismatched_sizes": True}
    options["attn_implementation"] = _attention(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, config, spec)
    with random_state_kept(device), _quiet():
        torch.manual_seed(spec.seed)
        loader, loaded = AutoModelForSequenceClassification, _options(spec, device, HEAD_MODULES)
        model, found = _load(loader, spec, output_loading_info=True, **options, **loaded)
    absent = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
    if lost := sorted(name for name in absent if layer_number(name) is not None):
        raise ModelError(f"The weights of {spec.model!r} lack {lost[0]!r}. Download the model again.")
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if decoder or getattr(model.config, "pad_token_id", None) is None:
        # Decoders look for the last token that is no padding, so it is to be that of the batches.
        model.config.pad_token_id = padding_id(load_tokenizer(spec), rows_of(model))
    head = tuple(name for name, _ in model.named_parameters() if name in absent or _is_beside_base(model, name))
    return _placed(model, spec, device), head


def _options(spec: RunSpec, device: torch.device, dense: Sequence[str] = ()) -> dict[str, Any]:
    """Return how the weights are loaded; linear layers called as one of `dense` stay dense over NF4."""
    require_weights(spec.model, spec.model_revision)
    dtype = resolve_dtype(spec.dtype, device)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if spec.quantization == "nf4":
        options["quantization_config"] = nf4_config(dtype, dense)
    if spec.quantization == "nf4" or device.type == "cuda":  # tensor by tensor: main memory may be less than the model
        options["device_map"] = {"": device}
    return options


def _attention(classes: Any, config: Any, spec: RunSpec) -> str:
    """Return the attention of the spec, eager where transformers has no fused one for the class of this config.

    Raises:
        ModelError: transformers has no such class.
    """
    found = classes.get(type(config), None)
    if found is None:
        raise ModelError(_not_such(spec, config))
    model_class = found[0] if isinstance(found, tuple) else found
    return spec.attention if model_class._supports_sdpa else "eager"


def _not_such(spec: RunSpec, config: Any) -> str:
    if spec.task == "classification":
        return f"transformers knows no classification by models of the family {config.model_type!r}. Give another one."
    able = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    remedy = "Set task=classification, or give a causal language model." if able else "Give a causal language model."
    return f"{spec.model!r} is no causal language model ({config.model_type}). {remedy}"


def _placed(model: Any, spec: RunSpec, device: torch.device) -> PreTrainedModel:
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
    config = _language_model_alone(spec).get("config") or _load(AutoConfig, spec)
    attention = _attention(MODEL_FOR_CAUSAL_LM_MAPPING, config, spec)
    return _described(AutoModelForCausalLM, config, spec, device, attention)


def describe_classifier(spec: RunSpec, device: torch.device) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return what `load_classifier` would give, on the meta device, with the labels that the config names.

    Args:
        spec: its model needs a config.json, no weights.
        device: that the model would be loaded to.

    Raises:
        ModelError: transformers cannot build it.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    config = _load(AutoConfig, spec)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    config.problem_type = "single_label_classification"
    attention = _attention(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, config, spec)
    model = _described(AutoModelForSequenceClassification, config, spec, device, attention, HEAD_MODULES)
    return model, tuple(name for name, _ in model.named_parameters() if _is_beside_base(model, name))


def _is_beside_base(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter of a classifier is no part of the base; a pooler inside the base is."""
    return not name.startswith(f"{model.base_model_prefix}.")


def _described(
    loader: Any, config: Any, spec: RunSpec, device: torch.device, attention: str, dense: Sequence[str] = ()
) -> PreTrainedModel:
    dtype = resolve_dtype(spec.dtype, device)
    with torch.device("meta"), no_init_weights():
        model = loader.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # with the first numbers left out, so is this
    if spec.quantization == "nf4":
        describe_in_nf4(model, dtype, dense)
    described: PreTrainedModel = model.eval()
    return described


def also_sees(spec: RunSpec) -> bool:
    """Return whether `load_model` takes the language model out of a model that also sees, under names of its own.

    Raises:
        ModelError: the model's config cannot be read.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    return bool(_language_model_alone(spec))


def _language_model_alone(spec: RunSpec) -> dict[str, Any]:
    """Return what loads the language model out of one that also sees, such as Gemma 3; nothing for all others."""
    config = _load(AutoConfig, spec)
    language = config.get_text_config()
    if language is config or type(language) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    return {"config": language, "key_mapping": {LANGUAGE_MODEL: "model.", r"^language_model\.lm_head\.": "lm_head."}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from advising to train the head: that is what happens next."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def load_tokenizer(spec: RunSpec) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        ModelError: the model has none that can be read.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    source = resolve_model(spec.model, spec.model_revision)
    if isinstance(source, Path) and not any(any(source.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(_NO_TOKENIZER.format(model=spec.model))  # some classes would be made with no words at all
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
            source,
            revision=spec.model_revision or "main",
            local_files_only=not online,
            trust_remote_code=False,  # and nobody is asked
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        if not local and not online:
            require_hub(f"model {spec.model!r}")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if loader is AutoTokenizer:
            raise ModelError(_NO_TOKENIZER.format(model=spec.model)) from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"Model {spec.model!r} comes with code of its own, which is not run here. "
                "Give a model of a family that transformers knows."
            ) from error
        raise ModelError(f"Model {spec.model!r} cannot be loaded: {first}") from error
