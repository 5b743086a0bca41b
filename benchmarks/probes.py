"""What a gradient probe costs: step time with a probe at the default interval over step time without.

`python -m benchmarks.probes [--device cuda] [--width 1024 --layers 8]`: random weights, both kinds interleaved, on the
CPU one thread.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kept import keep, say_versions
from engine.sparse.attach import SparseTuning, attach
from engine.sparse.optimizers import build_optimizer
from engine.sparse.probe import GradientProbe
from engine.spec import RunSpec

ROUNDS = 20
GOAL = 1.02  # at the default interval a probe may cost 2 percent


@dataclass
class Bench:
    """A model under sparse tuning, and one step of it."""

    model: LlamaForCausalLM
    tuning: SparseTuning
    optimizer: torch.optim.Optimizer
    ids: Tensor

    def step_s(self, *, probed: bool) -> float:
        """Return the seconds of one optimizer step."""
        self._wait()
        begun = time.perf_counter()
        self.tuning.probe = GradientProbe() if probed else None
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.tuning.end_micro_step()
        if self.tuning.probe:
            _ = self.tuning.probe.overall
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tuning.write_back()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.ids.is_cuda:
            torch.cuda.synchronize()


def build(device: str, width: int, layers: int, tokens: int) -> Bench:
    """Return a random Llama of the given size, in bf16 on a GPU and fp32 on the CPU."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    tuning = attach(model, RunSpec(model="random", method="random", density=0.01))
    optimizer = build_optimizer(tuning.entries, tuning.spec)
    return Bench(model, tuning, optimizer, torch.randint(0, 4096, (1, tokens), device=device))


def main() -> None:
    """Print the ratio and the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--readings", type=Path)
    options = parser.parse_args()
    kind = torch.device(options.device).type
    if kind == "cpu":
        torch.set_num_threads(1)
    say_versions(kind)
    torch.manual_seed(0)
    bench = build(options.device, options.width, options.layers, options.tokens)
    for _ in range(3):
        bench.step_s(probed=True)
    pairs = [(bench.step_s(probed=False), bench.step_s(probed=True)) for _ in range(ROUNDS)]
    interval = RunSpec.model_fields["probe_interval"].default
    extra = statistics.median(probed / plain for plain, probed in pairs) - 1
    ratio = round(1 + extra / interval, 4)
    row = {"name": "step with probes / step", "device": options.device, "ratio": ratio, "goal": GOAL}
    keep(options.readings, kind, [row], rounds=ROUNDS, interval=interval)
    if options.json:
        print(json.dumps([row]))
    else:
        print(f"one probed step / a step: {1 + extra:.3f}; every {interval} steps: {ratio:.4f} (goal {GOAL})")


if __name__ == "__main__":
    main()
