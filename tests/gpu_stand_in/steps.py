"""A few steps of some runs, on the CPU and on the stand-in: prints what both learnt as JSON.

Called with the compiled guard and a JSON list of fields of a spec.
"""
# ruff: noqa: E402 - the device comes before PyTorch

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
import device

device.load(sys.argv[1])

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real_runs import random_rows
from engine.data.moving import KnownMask, to_device
from engine.planner.trace import make_trainer
from engine.sparse.attach import SparseTuning
from engine.spec import RunSpec
from engine.train.tuning import start_tuning

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
COMMON: dict[str, Any] = {"model": "tiny", "density": 0.05, "sequence_length": 24, "max_steps": 5, "dtype": "float32"}
COMMON |= {"gradient_accumulation": 2, "learning_rate": 1e-2, "evaluation_interval": 0, "checkpoint_interval": 0}


def learnt(fields: dict[str, Any], place: str) -> float:
    """Train a model of random weights on `place`; return the sum of the absolute values that it learnt."""
    spec = RunSpec(**{**COMMON, **fields})
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(getattr(torch, spec.dtype)).to(place).requires_grad_(False)
    tuning = start_tuning(model, spec)
    make_trainer(model, spec, tuning, tuning.make_optimizer(), random_rows(spec, CONFIG.vocab_size)).run()
    sparse = isinstance(tuning, SparseTuning)
    values = [entry.read_values() for entry in tuning.entries] if sparse else [each.detach() for each in tuning.values]
    return sum(each.abs().sum().item() for each in values)


def main() -> None:
    """Print both results of each of the runs."""
    cases = json.loads(sys.argv[2])
    here = [learnt(fields, "cpu") for fields in cases]
    KnownMask.of = to_device  # a subclass of its own, which the device's tensors cannot be as well
    with device.stand_in():
        there = [learnt(fields, "cuda:0") for fields in cases]
    device.say([here, there])


if __name__ == "__main__":
    main()
