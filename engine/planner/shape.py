"""The shape of a model: every parameter's name and size, without loading one. Torch-free.

From config.json and the headers of the safetensors files; from the family's rules where a folder has no weights; from
the Hub's range requests where nothing is on this computer.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.errors import InvalidSpecError, ModelError, SpecProblem
from engine.planner import hub_files
from engine.planner.encoders import ENCODERS, classifier_tensors, is_head, labels_of
from engine.planner.families import (
    EXACT_FAMILIES,
    KNOWN_LAYOUTS,
    WITHOUT_FUSED_ATTENTION,
    Numbers,
    UnknownConfigError,
    as_loaded,
    entries_of,
    is_tied,
    language_config,
    language_tensors,
    parameters_of,
    read_numbers,
    tensors_of,
)
from engine.planner.headers import Shape, read_headers, weight_files
from engine.planner.layouts import EMBEDDINGS, Layout, read_layout
from engine.presets import bundled_models
from engine.targets import layer_number, match_targets

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # name, or owner/name
_PLACES = ("wpe.weight", "position_embeddings.weight", "embed_positions.weight")
_FIXED_PLACES = ("codegen", "gptj")  # families whose table is no parameter
_ROBERTA_PLACES = 2  # before that of the first token
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What the plan needs of a model. `tensors`: parameter name to shape, tied weights once."""

    source: str
    family: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool
    sliding_window: int | None
    experts_per_token: int
    tensors: Mapping[str, Shape]
    dtype: str  # as stored: BF16, F16, F32; empty where there are no weights
    exact: bool  # whether the closed forms were checked on this family
    counted: bool  # whether the tensors are the model's own, or a guess at a family that is not known
    layout: Layout
    positions: int | None = None  # tokens of the longest row the model was made for
    fused_attention: bool = True  # whether transformers computes it by fused kernels where it may
    moving: float = 1.0  # what comes and goes over what the closed forms say, by a trace of this model
    scaled: bool = False  # whether there was such a trace
    classifier: bool = False  # with a head for labels, whose number `vocabulary` then is

    @cached_property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return entries_of(self.tensors)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the token embedding."""
        return next((name for name in self.tensors if name.endswith(EMBEDDINGS)), None)

    @property
    def embedding_rows(self) -> int | None:
        """The rows of the table that token ids are looked up in; None where it is not known."""
        if self.embedding is not None:
            return self.tensors[self.embedding][0]
        return None if self.classifier else self.vocabulary

    @cached_property
    def longest_row(self) -> int | None:
        """Tokens that have a place in a table of positions; None where there is no table."""
        if self.family in _FIXED_PLACES:
            return self.positions
        places = next((shape[0] for name, shape in self.tensors.items() if name.endswith(_PLACES)), None)
        if places is None:
            return None
        before = _ROBERTA_PLACES if self.layout.label_head == "roberta" else 0
        return min(places, self.positions or places) - before

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """How far each block sees, in tokens; None: all the row."""
        return tuple(map(self.layout.window, range(self.layers)))

    @cached_property
    def blocks(self) -> tuple[Mapping[str, str], ...]:
        """The parameters of each block: their name inside it, without `.weight`, to their name."""
        blocks: list[dict[str, str]] = [{} for _ in range(self.layers)]
        for name in self.tensors:
            layer = layer_number(name)
            if layer is not None and layer < self.layers:
                blocks[layer][name.split(f".{layer}.", 1)[1].removesuffix(".weight")] = name
        return tuple(blocks)

    @cached_property
    def head(self) -> str | None:
        """The name of the output layer's weight; the embedding's where they are tied."""
        return next((name for name in self.tensors if name.endswith(_HEADS)), self.embedding if self.tied else None)

    @cached_property
    def dense_numel(self) -> int:
        """Entries that are trained dense beside any method: the head of a classifier."""
        return sum(math.prod(shape) for name, shape in self.tensors.items() if self.classifier and is_head(name))


def resolve_model(model: str, revision: str | None = None) -> str | Path:
    """Return what `model` means: the folder of a bundled name or a local folder, else a Hub id.

    Args:
        model: bundled name, local folder or Hub id.
        revision: on the Hub; a folder has none.

    Raises:
        ModelError: it is none of the three, or a revision is given for a folder.
    """
    bundled = bundled_models().get(model)
    local = Path(model).expanduser()
    folder = bundled if bundled is not None else local if local.is_dir() else None
    if folder is not None:
        if revision is not None:
            raise ModelError(
                f"model_revision {revision!r} is for models on the Hub, and {model!r} is a folder. Clear it."
            )
        return _require_config(folder)
    if local.exists() or not _HUB_ID.fullmatch(model) or ".." in model:
        names = ", ".join(bundled_models())
        raise ModelError(
            f"model {model!r} is no folder on this computer, no bundled model ({names}) and no Hub id (owner/name). "
            "Check the spelling, or give the folder that holds config.json."
        )
    return model


def _require_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Model folder {str(folder)!r} has no config.json. "
            "Give the folder that holds config.json, *.safetensors and the tokenizer's files."
        )
    return folder


def has_weights(folder: Path) -> bool:
    """Return whether a model folder holds the safetensors files that it should."""
    return bool(weight_files(folder))


def require_weights(model: str, revision: str | None = None) -> str | Path:
    """Return what `model` means, as `resolve_model` does.

    Raises:
        ModelError: it is a folder without weights, or none of the things that a model can be.
        HubUnreachableError: it is on the Hub only, and the Hub does not answer.
    """
    found = resolve_model(model, revision)
    if isinstance(found, str):
        hub_files.require_tensors(found, revision)
    if isinstance(found, Path) and not has_weights(found):
        raise ModelError(
            f"Model folder {str(found)!r} has a config.json but no weights (*.safetensors); "
            "it can be planned, but not run. "
            "Put the weights into the folder, or give another model."
        )
    return found


def read_shape(model: str, revision: str | None = None, task: str = "causal") -> ModelShape:
    """Return the shape of a bundled, local or Hub model; read once per state of its files.

    Args:
        model: bundled name, local folder or Hub id.
        revision: on the Hub.
        task: causal, or classification: with a head for labels instead of the output layer.

    Raises:
        ModelError: the model cannot be found or its files cannot be read.
        HubUnreachableError: it is on the Hub, which does not answer.
    """
    found = resolve_model(model, revision)
    if isinstance(found, Path):
        return _read_folder(found.absolute(), _stamp(found), task)
    return _read_hub(found, revision, task)


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    with os.scandir(folder) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith((".json", ".safetensors"))]
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in files))


@lru_cache(maxsize=32)
def _read_folder(folder: Path, _stamp: tuple[tuple[str, int, int], ...], task: str) -> ModelShape:
    config = _load_config(folder / "config.json")
    files = weight_files(folder)
    tensors, dtype = read_headers(files) if files else (None, "")
    return build_shape(str(folder), config, tensors, dtype, task)


@lru_cache(maxsize=32)
def _read_hub(model: str, revision: str | None, task: str) -> ModelShape:
    config = _load_config(hub_files.config_path(model, revision))
    tensors, dtype = hub_files.read_tensors(model, revision)
    return build_shape(model, config, tensors, dtype, task)


def _load_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{str(path)!r} is not a readable config.json. Download the model again.")
    return config


def build_shape(
    source: str, config: dict[str, Any], tensors: Mapping[str, Shape] | None, dtype: str, task: str = "causal"
) -> ModelShape:
    """Return the shape that a config and, where there are weights, their tensors describe.

    Args:
        source: the folder or Hub id, for error messages.
        config: the content of config.json.
        tensors: as stored, name to shape; None where there are no weights: the family's rules then say.
        dtype: as stored; empty where there are no weights.
        task: causal or classification.

    Raises:
        ModelError: the config lacks a number that the plan needs, or the weights are stored quantised.
    """
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{source!r} has an encoder and a decoder ({config.get('model_type')}), which are not trained here. "
            + ("Give an encoder." if task == "classification" else "Give a causal language model.")
        )
    try:
        numbers = read_numbers(config)
    except UnknownConfigError as missing:
        raise ModelError(
            f"config.json of {source!r} has no usable {missing}, so it is no language model that can be planned. "
            "Give a causal language model in the Hugging Face layout."
        ) from None
    if task == "causal" and numbers.family in ENCODERS and not config.get("is_decoder"):
        raise ModelError(
            f"{source!r} is an encoder ({numbers.family}), which reads a text from both sides and cannot go on with "
            "one. Set task=classification, or give a causal language model."
        )
    tied = is_tied(numbers)
    if tensors is not None:
        _require_plain(source, config)
        tensors = language_tensors(parameters_of(tensors), config)
        if numbers.tied is None:
            tied = not any(name.endswith(_HEADS) for name in tensors)
        if tied:
            tensors = {name: shape for name, shape in tensors.items() if not name.endswith(_HEADS)}
        tensors = as_loaded(replace(numbers, tied=tied), config, tensors)
    shape = _shape_of(source, config, numbers, tied, tensors or tensors_of(numbers, config), dtype)
    return shape if task == "causal" else _classifier(shape, config)


def _require_plain(source: str, config: dict[str, Any]) -> None:
    """Refuse weights that are packed: their tensors have other sizes than the parameters."""
    stored = config.get("quantization_config")
    if stored:
        way = stored.get("quant_method", "quantised") if isinstance(stored, dict) else "quantised"
        raise ModelError(
            f"The weights of {source!r} are stored quantised ({way}), which can be neither planned nor trained here. "
            "Give the model they were made from; quantization=nf4 stores it in 4 bit while it is loaded."
        )


def _classifier(shape: ModelShape, config: dict[str, Any]) -> ModelShape:
    """Return the shape with a head for labels; one that also sees is loaded whole, which no closed form knows."""
    try:
        tensors = classifier_tensors(shape.family, config, shape.tensors)
    except KeyError as missing:
        raise ModelError(
            f"config.json of {shape.source!r} has no usable {missing.args[0]}, so it cannot be planned. "
            "Give a model in the Hugging Face layout."
        ) from None
    known, labels = shape.family in ENCODERS, labels_of(config)
    exact = shape.layout.plain if known else shape.exact and "text_config" not in config
    counted = shape.counted or known
    return replace(shape, tensors=tensors, vocabulary=labels, tied=False, exact=exact, counted=counted, classifier=True)


def _shape_of(
    source: str, config: dict[str, Any], numbers: Numbers, tied: bool, tensors: Mapping[str, Shape], dtype: str
) -> ModelShape:
    head_norms = any("q_norm" in name.split(".") for name in tensors)
    layout = read_layout(numbers.family, language_config(config), numbers.layers, head_norms=head_norms)
    return ModelShape(
        source=source,
        family=numbers.family,
        architecture=numbers.architecture,
        hidden=numbers.hidden,
        layers=numbers.layers,
        heads=numbers.heads,
        kv_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        ffn=numbers.ffn,
        vocabulary=numbers.vocabulary,
        tied=tied,
        sliding_window=numbers.sliding_window,
        experts_per_token=numbers.experts_per_token,
        tensors=tensors,
        dtype=dtype,
        exact=numbers.family in EXACT_FAMILIES and layout.plain,
        counted=bool(dtype) or numbers.family in KNOWN_LAYOUTS,
        layout=layout,
        positions=numbers.positions,
        fused_attention=numbers.family not in WITHOUT_FUSED_ATTENTION,
    )


def require_places(shape: ModelShape, tokens: int) -> None:
    """Do nothing where a row of so many tokens has a place for each.

    Raises:
        InvalidSpecError: the model's table of positions is shorter.
    """
    if shape.longest_row is not None and tokens > shape.longest_row:
        sentence = (
            f"sequence_length must be at most {shape.longest_row:,}, the positions that {shape.source!r} has, "
            f"got {tokens:,}. Lower it."
        )
        raise InvalidSpecError([SpecProblem("sequence_length", sentence)])


def target_tensors(shape: ModelShape, targets: str | tuple[str, ...]) -> dict[str, Shape]:
    """Return the parameters that `targets` mean, name to shape.

    Raises:
        TargetsError: nothing matches.
    """
    base = {name: sizes for name, sizes in shape.tensors.items() if not (shape.classifier and is_head(name))}
    return {name: base[name] for name in match_targets(base, targets)}
