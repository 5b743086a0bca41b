"""The result of a run over its base model: put in and taken out, exactly."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from engine.errors import DeltaError
from engine.models import load_classifier, load_model
from engine.sparse.base_weight import base_weights
from engine.sparse.delta import SparseDelta, read_info, require_base
from engine.spec import RunSpec
from engine.train.baselines import keep_dtype_of_ia3
from engine.train.head import Switch, apply_head, read_head


def apply_result(model: PreTrainedModel, folder: Path) -> Switch:
    """Put the result in `folder` into `model`, its base.

    Returns:
        A function that takes the result out (False), after which the model is its base bit for bit, and in (True).

    Raises:
        DeltaError: there is no result that can be read, or the model is not its base.
    """
    head = read_head(folder)
    switches = [_apply(model, folder, head), *([apply_head(model, head)] if head else [])]

    def switch(applied: bool) -> None:
        for each in switches:
            each(applied)

    return switch


def load_base(spec: RunSpec, device: torch.device, labels: tuple[str, ...] | None) -> PreTrainedModel:
    """Return the base model of a result, as `load_model` does; with a head where the result has `labels`."""
    return load_model(spec, device) if labels is None else load_classifier(spec, device, labels)[0]


def _apply(model: PreTrainedModel, folder: Path, head: Collection[str]) -> Switch:
    info = read_info(folder)
    if info.method in ("lora", "ia3", "full"):
        require_base(info, {name: weight for name, weight in base_weights(model).items() if name not in head})
        try:
            return _full(model, folder) if info.method == "full" else _adapter(model, folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unreadable(info.method, folder, error) from error
    return _sparse(model, folder)


def merge_result(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model`, a dense base, with the lora, ia3 or full result in `folder` merged into its weights.

    Raises:
        DeltaError: the result cannot be read.
    """
    info = read_info(folder)
    try:
        if info.method == "full":
            _full(model, folder)
            return model
        adapter: Any = _wrapped(model, folder)
        merged: PreTrainedModel = adapter.merge_and_unload()
        return merged
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unreadable(info.method, folder, error) from error


def _unreadable(method: str, folder: Path, error: Exception) -> DeltaError:
    return DeltaError(
        f"The {method} result in {str(folder)!r} cannot be read ({type(error).__name__}: {error}). Train the run again."
    )


def _sparse(model: PreTrainedModel, folder: Path) -> Switch:
    entries = SparseDelta.load(folder).apply(model)

    def switch(applied: bool) -> None:
        for entry in entries:
            if applied:
                entry.write_back()
            else:
                entry.restore()

    return switch


def _adapter(model: PreTrainedModel, folder: Path) -> Switch:
    adapter = _wrapped(model, folder).eval()
    keep_dtype_of_ia3(adapter)
    layers: Any = adapter.base_model

    def switch(applied: bool) -> None:
        if applied:
            layers.enable_adapter_layers()
        else:
            layers.disable_adapter_layers()

    return switch


def _wrapped(model: PreTrainedModel, folder: Path) -> Any:
    """Return `model` with the adapter in `folder` beside its layers, as PEFT puts it there."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def _full(model: PreTrainedModel, folder: Path) -> Switch:
    """Both copies of the trained weights lie in main memory; the model holds one of them."""
    weights = dict(model.named_parameters())
    tuned: dict[str, Tensor] = load_file(folder / "delta.safetensors")
    base = {name: weights[name].detach().cpu().clone() for name in tuned}

    @torch.no_grad()
    def switch(applied: bool) -> None:
        for name, tensor in (tuned if applied else base).items():
            weights[name].copy_(tensor)

    switch(True)
    return switch
