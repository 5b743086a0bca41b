"""What a person compares sparse tuning with: LoRA (arXiv:2106.09685), IA3 (arXiv:2205.05638), and full fine-tuning.

The adapters are those of the PEFT library, in fp32 over any base; LoRA over NF4 is QLoRA (arXiv:2305.14314).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.rng import random_state_kept
from engine.sparse.base_weight import NF4Weight, base_weights
from engine.sparse.delta import DeltaInfo, fingerprint
from engine.sparse.optimizers import values_optimizer
from engine.sparse.probe import GradientProbe
from engine.sparse.spiel import Spiel
from engine.spec import RunSpec
from engine.targets import adapted_weights, is_feedforward, match_targets

if TYPE_CHECKING:  # PEFT takes a second to import: only who has an adapter does
    from peft import PeftConfig, PeftModel


class _Baseline:
    """What both baselines have in common: nothing is chosen, nothing is probed."""

    def __init__(self, model: PreTrainedModel, spec: RunSpec, without: Collection[str] = ()) -> None:
        """Freeze `model`; whoever inherits says what is trained, none of the parameters named in `without`."""
        self.spec = spec
        self.probe: GradientProbe | None = None
        self.spiel: Spiel | None = None
        self._weights = {name: weight for name, weight in base_weights(model).items() if name not in without}
        quantised = any(isinstance(weight, NF4Weight) for weight in self._weights.values())
        self._info = DeltaInfo(spec.method, 1.0, spec.model, fingerprint(self._weights), "nf4" if quantised else "none")
        self._targets: dict[str, nn.Parameter | NF4Weight] = {}
        self._values: dict[str, nn.Parameter] = {}
        self._masters: list[tuple[nn.Parameter, nn.Parameter]] = []  # a 16-bit weight, its values in fp32
        model.requires_grad_(False)

    @property
    def named_values(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._values

    @property
    def values(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [*self._values.values()]

    @property
    def num_targets(self) -> int:
        """Weights that are trained, or that have an adapter."""
        return len(self._targets)

    @property
    def num_active(self) -> int:
        """Trained entries."""
        return sum(values.numel() for values in self._values.values())

    @property
    def target_numel(self) -> int:
        """Entries of all targets."""
        return sum(weight.numel() for weight in self._targets.values())

    @property
    def selecting(self) -> bool:
        """Nothing is to be chosen."""
        return False

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer that the spec names, over `values`."""
        return values_optimizer(self.values, self.spec)

    def begin_reselection(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Nothing changes places."""

    def end_micro_step(self) -> None:
        """Nothing waits for the end of a backward."""

    def finite(self) -> bool:
        """Nothing is chosen by gradients."""
        return True

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into their weights; all other values are where the forward reads them."""
        for weight, master in self._masters:
            weight.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Return the values, name to tensor."""
        return {f"{name}.values": values.detach() for name, values in self._values.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, and write it into the weights."""
        for name, values in self._values.items():
            values.copy_(state[f"{name}.values"])
        self.write_back()

    def _save_info(self, folder: Path) -> None:
        info = replace(self._info, density=self.num_active / self.target_numel)
        (folder / "delta.json").write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")


class AdapterTuning(_Baseline):
    """LoRA or IA3 at work on a model, whose linear layers PEFT wraps in place."""

    def __init__(self, model: PreTrainedModel, spec: RunSpec, without: Collection[str] = ()) -> None:
        """Put an adapter beside each linear layer that `spec.targets` means; `spec.seed` decides its first numbers.

        Raises:
            TargetsError: there is no such layer.
        """
        from peft import get_peft_model

        super().__init__(model, spec, without)
        config = _adapter_config(model, self._weights, spec)
        self._targets = {name: self._weights[name] for name in _adapted(self._weights, spec)}
        with random_state_kept(model.device):
            torch.manual_seed(spec.seed)
            self._adapter = get_peft_model(model, config)
        keep_dtype_of_ia3(self._adapter)
        self._values = {name: each for name, each in self._adapter.named_parameters() if each.requires_grad}

    def detach(self) -> None:
        """Put the layers back that PEFT wrapped; its own `unload` refuses IA3 over 4 bit."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model: Any = self._adapter.base_model.model
        for name, module in [*model.named_modules()]:
            if isinstance(module, BaseTunerLayer):
                model.set_submodule(name, module.get_base_layer())
        del model.peft_config

    def save_result(self, folder: Path) -> None:
        """Write the adapter as PEFT does, and delta.json beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._adapter.save_pretrained(str(folder), save_embedding_layers=False)
        self._save_info(folder)


class FullTuning(_Baseline):
    """Every entry of the targets trained. A 16-bit weight has an fp32 master, which holds small updates; see `values`.

    The master collects the gradient in fp32, one weight's 16-bit gradient alive at a time, and the weight is the master
    rounded. An fp32 weight is its own master.
    """

    def __init__(self, model: PreTrainedModel, spec: RunSpec, without: Collection[str] = ()) -> None:
        """Train the parameters that `spec.targets` means.

        Raises:
            TargetsError: there is none.
        """
        super().__init__(model, spec, without)
        self._hooks: list[RemovableHandle] = []
        for name in match_targets({name: tuple(weight.shape) for name, weight in self._weights.items()}, spec.targets):
            weight = self._weights[name]
            assert isinstance(weight, nn.Parameter), "full over NF4 is refused with the spec"
            weight.requires_grad_(True)
            self._targets[name] = self._values[name] = weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                self._values[name] = nn.Parameter(weight.detach().float())
                self._masters.append((weight, self._values[name]))
                self._hooks.append(weight.register_post_accumulate_grad_hook(move_gradient(self._values[name])))

    def detach(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def save_result(self, folder: Path) -> None:
        """Write the tuned weights, in the dtype of the model, to delta.safetensors, and delta.json beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: each.detach() for name, each in self._targets.items() if isinstance(each, nn.Parameter)}
        save_file(tensors, folder / "delta.safetensors")
        self._save_info(folder)


def move_gradient(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Return a hook that adds the gradient of a 16-bit weight to that of its fp32 master, and frees it."""

    def move(weight: Tensor) -> None:
        grad, weight.grad = weight.grad, None
        if grad is not None:
            master.grad = grad.to(master.dtype) if master.grad is None else master.grad.add_(grad)

    return move


def keep_dtype_of_ia3(adapter: "PeftModel") -> None:
    """Let IA3 layers over a 4-bit base return the dtype that they were given.

    PEFT computes them in fp32 and leaves it to autocast to go back; without it keys and queries would not meet.
    """
    for module in adapter.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "ia3_l"):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


def _adapted(weights: Mapping[str, nn.Parameter | NF4Weight], spec: RunSpec) -> list[str]:
    assert spec.method in ("lora", "ia3")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return adapted_weights(shapes, spec.targets, spec.method)


def _adapter_config(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter | NF4Weight], spec: RunSpec
) -> "PeftConfig":
    from peft import IA3Config, LoraConfig

    layers = [name.removesuffix(".weight") for name in _adapted(weights, spec)]
    settings: dict[str, Any] = {
        # Without a task PEFT leaves the head alone, which is trained and saved beside the adapter.
        "task_type": "CAUSAL_LM" if spec.task == "causal" else None,
        "target_modules": _names_of(layers, model),
        "fan_in_fan_out": isinstance(model.get_submodule(layers[0]), Conv1D),
    }
    if spec.method == "lora":
        return LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, lora_dropout=0.0, bias="none", **settings)
    scaled = [layer for layer in layers if is_feedforward(f"{layer}.weight")]
    return IA3Config(feedforward_modules=_names_of(scaled, model), **settings)


def _names_of(layers: list[str], model: nn.Module) -> list[str] | str:
    """Return the last words of `layers` where these mean no other layer, as adapter files do; else a pattern."""
    words = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    if {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in words} == set(layers):
        return words
    return "|".join(re.escape(layer) for layer in layers)
