"""The closed forms against a trace of the real model classes: `python -m benchmarks.planner_formulas`.

Eleven architectures in their real widths and few layers, RoBERTa as a classifier, sixteen settings each; peaks without
context and library workspaces. The error of what comes and goes (activations, temporaries) stands beside that of the
peak, since a large base hides it. `--family NAME` for one, `--setting NUMBER` for one, `--json` for all parts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.hardware import Device
from engine.planner.encoders import ENCODERS
from engine.planner.estimate import estimate
from engine.planner.ledger import RESIDENT
from engine.planner.shape import read_shape
from engine.planner.trace import trace
from engine.spec import RunSpec
from engine.units import GIB

CUDA = Device("cuda:0", "CUDA", 80 * GIB, 80 * GIB)
CPU = Device("cpu", "CPU", 80 * GIB, 80 * GIB)

# The numbers of the published config.json files, but for the layers and, where the rows are to reach beyond it, the
# window.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "sliding_window": 512,
    },
    "qwen2": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
    },
    "phi": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 51200,
    },
    "gpt2": {"n_embd": 1280, "n_layer": 6, "n_head": 20, "vocab_size": 50257, "n_positions": 1024},
    "gpt_neox": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 50304,
    },
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "roberta": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "vocab_size": 50265,
        "max_position_embeddings": 1026,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
}

# `cpu`: the target is the CPU, else a CUDA device.
SETTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True, "micro_batch_size": 4},
    {"attention": "eager", "targets": "attention"},
    {
        "attention": "eager",
        "targets": "all",
        "gradient_checkpointing": True,
        "micro_batch_size": 4,
        "sequence_length": 256,
    },
    {"dtype": "float32"},
    {"dtype": "float32", "targets": "all", "gradient_checkpointing": True},
    {"method": "spiel-ag", "micro_batch_size": 4, "sequence_length": 256},
    {"method": "spiel-ma", "targets": "all", "gradient_checkpointing": True, "gradient_accumulation": 2},
    {"method": "lora"},
    {
        "method": "lora",
        "targets": "attention",
        "quantization": "nf4",
        "gradient_checkpointing": True,
        "micro_batch_size": 4,
    },
    {"method": "full", "targets": "all"},
    {"quantization": "nf4", "attention": "eager", "sequence_length": 256},
    {
        "quantization": "nf4",
        "method": "spiel-ag",
        "targets": "attention",
        "gradient_checkpointing": True,
        "micro_batch_size": 4,
    },
    {"chunked_loss": True, "targets": "all", "gradient_checkpointing": True},
    {"chunked_loss": True, "gradient_checkpointing": True, "micro_batch_size": 4, "gradient_accumulation": 2},
    {"cpu": True, "dtype": "float32", "micro_batch_size": 4, "sequence_length": 256},
)
DEFAULTS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "sequence_length": 1024,
    "gradient_accumulation": 1,
    "density": 0.02,
    "probe_interval": 0,
}


def compare(model: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return closed form and trace of one setting of a model; bytes, and errors in percent.

    `moving_error`: of what is not resident, in percent of the traced peak of that part.
    """
    fields = {**DEFAULTS, **setting}
    device = CPU if fields.pop("cpu", False) else CUDA
    task: Any = "classification" if Path(model).name in ENCODERS else "causal"
    spec = RunSpec(model=model, task=task, **fields)
    plan = estimate(spec, read_shape(model, task=task), device)
    started = time.perf_counter()
    peak = trace(spec, device).peak
    trace_s = time.perf_counter() - started
    parts = {name: size for name, size in plan.parts.items() if name not in ("workspace", "context")}
    moving, planned = (_moving(each) for each in (peak.parts, parts))
    return {
        "setting": dict(setting),
        "planned": parts,
        "traced": dict(peak.parts),
        "planned_bytes": sum(parts.values()),
        "traced_bytes": peak.total,
        "error": 100 * (sum(parts.values()) / peak.total - 1),
        "moving_error": 100 * (planned / moving - 1) if moving else 0.0,
        "phase": plan.phase,
        "traced_phase": f"{peak.phase}: {peak.operation} {peak.module}",
        "largest": peak.largest,
        "trace_s": trace_s,
    }


def _moving(parts: Mapping[str, int]) -> int:
    return sum(size for name, size in parts.items() if name not in RESIDENT)


def write_config(family: str, folder: Path) -> str:
    """Write the config.json of a family into `folder`; return it."""
    from transformers import AutoConfig

    AutoConfig.for_model(family, **FAMILIES[family]).save_pretrained(folder)
    return str(folder)


def measure(family: str, settings: tuple[int, ...]) -> list[dict[str, Any]]:
    """Compare one family in the settings of these numbers."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(family, Path(folder, family))
        return [{"family": family, "number": number, **compare(model, SETTINGS[number])} for number in settings]


def main() -> None:
    """Print a line a family and setting, then the largest and the median error of each family; or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES))
    parser.add_argument("--setting", action="append", type=int, choices=range(len(SETTINGS)), metavar="NUMBER")
    options = parser.parse_args()
    numbers = tuple(options.setting or range(len(SETTINGS)))
    families = {family: measure(family, numbers) for family in options.family or FAMILIES}
    if options.json:
        print(json.dumps(families))
        return
    for rows in families.values():
        for row in rows:
            print(_line(row))
    for family, rows in families.items():
        errors = [abs(row["error"]) for row in rows]
        print(f"{family:<12} largest error {max(errors):6.2f} %   median {statistics.median(errors):6.2f} %")


def _line(row: Mapping[str, Any]) -> str:
    words = " ".join(
        str(value) if name != "micro_batch_size" else f"rows={value}" for name, value in row["setting"].items()
    )
    return (
        f"{row['family']:<12}{row['number']:>3} {row['planned_bytes'] / GIB:7.3f} GiB, traced "
        f"{row['traced_bytes'] / GIB:7.3f} GiB  {row['error']:+6.2f} %  moving {row['moving_error']:+7.2f} %  "
        f"{row['phase']} | {row['traced_phase']} | {words}"
    )


if __name__ == "__main__":
    main()
