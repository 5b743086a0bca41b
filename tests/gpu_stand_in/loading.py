"""Loads a model onto the stand-in as a run does: prints where its tensors lie after the loader, and in the end.

Called with the compiled guard and an empty folder.
"""
# ruff: noqa: E402 - the device comes before PyTorch

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
import device

device.load(sys.argv[1])
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the stand-in is of one thread

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine.models import load_model
from engine.spec import RunSpec


def devices(model: LlamaForCausalLM) -> list[str]:
    """Return where the tensors of `model` lie."""
    return sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})


class Watched(LlamaForCausalLM):
    """Notes where its tensors lie when it is moved as a whole."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Note it, and move."""
        print(json.dumps(devices(self)))
        return super().to(*args, **kwargs)


def main() -> None:
    """Print where the tensors lie when the loader is done, and in the end."""
    folder, sizes = sys.argv[2], {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 176}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(folder)
    AutoModelForCausalLM.register(LlamaConfig, Watched, exist_ok=True)
    with device.stand_in():
        model = load_model(RunSpec(model=folder), torch.device("cuda:0"))
    device.say(devices(model))


if __name__ == "__main__":
    main()
