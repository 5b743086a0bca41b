"""The randomly initialised twin of a model: what it was before it was trained."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def random_twin(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a model of the same configuration, dtype and device, initialised as its family initialises itself.

    The numbers are drawn on the CPU, so that every device gets the same; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    placed: nn.Module = twin
    placed.to(model.device).eval()
    return twin
