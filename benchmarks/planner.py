"""What the planner says against what is known: `python -m benchmarks.planner TABLE [--json]`.

trace: the trace against the same count over a real step on the CPU, small models of several families.
formulas: the closed forms against the trace, eleven families in sixteen settings each (`planner_formulas` says more).
reserved: what the caching allocator takes for a step and the least limit under which it succeeds, against its replay.
sift: Table 1 of arXiv:2312.11875, under the paper's accounting, and beside it the true peak of this program's step.
spiel: Table 3 of arXiv:2401.16405, the least limit at which its code succeeds.
peft: what PEFT's comparison of methods reserved on an L40S; `published_peft.py` says how.
patience: how long a person waits: for a plan with its remedies while a slider moves, Fit to budget and a trace.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import planner_formulas, published_peft
from benchmarks.published_spiel import cells, least_gib
from engine.hardware import Device
from engine.models import load_model
from engine.planner.cards import card_device
from engine.planner.estimate import estimate
from engine.planner.fit import fit_spec
from engine.planner.hub_files import config_path
from engine.planner.ledger import add_up
from engine.planner.plan import make_plan
from engine.planner.shape import read_shape
from engine.planner.trace import count_real, trace
from engine.planner.trace_worker import trace_spec
from engine.spec import RunSpec
from engine.tracer import Tracer
from engine.units import GIB

Row = dict[str, Any]
CPU = Device("cpu", "CPU", 64 * GIB, 64 * GIB)
CARD_24 = "RTX 4090 24 GB"
CARD = Device("cuda:0", "a card of 80 GiB", 80 * GIB, 80 * GIB)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
FAMILIES: dict[str, Row] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "tie_word_embeddings": True},
    "gemma3_text": {**SMALL, "sliding_window": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 256},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
SETTINGS: list[Row] = [
    {"method": "sift"},
    {"method": "spiel-ag"},
    {"method": "spiel-ma"},
    {"method": "lora"},
    {"method": "full"},
    {"method": "sift", "quantization": "nf4"},
    {"method": "lora", "quantization": "nf4"},
]
RESERVED: list[Row] = [
    {"method": "sift"},
    {"method": "sift", "gradient_checkpointing": True},
    {"method": "spiel-ag", "gradient_checkpointing": True, "gradient_accumulation": 4},
    {"method": "lora", "gradient_checkpointing": True},
    {"method": "lora", "gradient_checkpointing": True, "quantization": "nf4"},
    {"method": "sift", "gradient_checkpointing": True, "quantization": "nf4", "gradient_accumulation": 4},
]
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
# GiB: parameters, gradient, optimizer states, activations without and with checkpointing.
SIFT_TABLE_1 = {"params": 12.55, "gradient": 0.626, "optimizer": 2.51, "activations": 35.72, "activations, GC": 0.81}


def trace_rows() -> Iterator[Row]:
    """Yield the peak of the trace and of the real step, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for family, config in FAMILIES.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
            model.save_pretrained(Path(folder, family))
            for setting in SETTINGS:
                for checkpointing in (False, True):
                    yield _trace_row(family, str(Path(folder, family)), setting, checkpointing)


def _trace_row(family: str, folder: str, setting: Row, checkpointing: bool) -> Row:
    # What the other ways to the gradient keep hangs on which entries are chosen.
    fields: Row = {**setting, "gradient_checkpointing": checkpointing, "gradient_way": "dense"}
    spec = RunSpec(model=folder, sequence_length=128, density=0.05, gradient_accumulation=1, **fields)
    real = add_up(count_real(load_model(spec, torch.device("cpu")), spec), 0, host_apart=False)
    ours = trace(spec, CPU, rounding=0)
    name = " ".join([family, setting["method"], *(["nf4"] if "quantization" in setting else [])])
    return _row(name + (", GC" if checkpointing else ""), "bytes", real.peak.total, ours.peak.total)


def sift_rows() -> Iterator[Row]:
    """Yield the true peak, and Table 1 by its accounting: what the forward leaves, bf16 gradients, fp32 states."""
    found = {}
    for suffix, checkpointing in (("", False), (", GC", True)):
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model("llama", **LLAMA_7B).save_pretrained(folder)
            spec = RunSpec(
                model=folder,
                sequence_length=2048,
                density=0.05,
                targets="all",
                attention="eager",
                gradient_accumulation=1,
                gradient_checkpointing=checkpointing,
            )
            traced = trace_spec(spec, CARD)
        parts = traced.figures.after_forward.parts
        found |= {"params": parts["parameters"], f"activations{suffix}": parts["saved_activations"]}
        found |= {"gradient": parts["optimizer_states"] // 4, "optimizer": parts["optimizer_states"]}
        peak = traced.figures.peak
        yield {"name": f"true peak of a step{suffix}", "unit": "GiB", "ours": peak.total / GIB, "phase": peak.phase}
        yield {"name": f"reserved at the least limit{suffix}", "unit": "GiB", "ours": traced.minimum_bytes / GIB}
    for name, published in SIFT_TABLE_1.items():
        yield _row(name, "GiB", published, found[name] / GIB)


def spiel_rows() -> Iterator[Row]:
    """Yield the 24 cells of Table 3, GiB."""
    for cell, published in cells():
        name = f"{cell.size} {cell.method}" + (", GC" if cell.checkpointing else "")
        yield _row(name, "GiB", published, least_gib(cell))


def peft_rows() -> Iterator[Row]:
    """Yield what was reserved on a GPU beside the plan, of the closed forms and traced; GiB."""
    for name, measured, ours in published_peft.rows():
        yield _row(name, "GiB", measured / GIB, ours / GIB)


def _row(name: str, unit: str, known: float, ours: float) -> Row:
    return {"name": name, "unit": unit, "known": known, "ours": ours, "ratio": ours / known}


def formula_rows() -> Iterator[Row]:
    """Yield the closed forms' peak beside the trace's: eleven families, sixteen settings; see `planner_formulas`."""
    for family in planner_formulas.FAMILIES:
        for row in planner_formulas.measure(family, tuple(range(len(planner_formulas.SETTINGS)))):
            name = f"{family}, setting {row['number']}"
            yield _row(name, "GiB", row["traced_bytes"] / GIB, row["planned_bytes"] / GIB)


def reserved_rows() -> Iterator[Row]:
    """Yield what the closed forms say is reserved, and the least limit, beside the replay of a trace; GiB."""
    for model in ("huggyllama/llama-7b", "Qwen/Qwen3-8B"):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(config_path(model, None), Path(folder, "config.json"))
            for length in (512, 2048):
                for setting in RESERVED:
                    yield from _reserved_rows(model, folder, {"sequence_length": length, **setting})


def _reserved_rows(model: str, folder: str, fields: Row) -> Iterator[Row]:
    spec = RunSpec(model=folder, density=0.01, probe_interval=0, **{"gradient_accumulation": 1, **fields})
    plan, found = estimate(spec, read_shape(folder), CARD), trace_spec(spec, CARD)
    words = [
        model.split("/")[1],
        str(spec.sequence_length),
        spec.method,
        *(["nf4"] if spec.quantization == "nf4" else []),
    ]
    name = " ".join(words) + (", GC" if spec.gradient_checkpointing else "")
    around = plan.parts["workspace"]
    yield _row(f"{name}, reserved", "GiB", found.reserved_bytes / GIB, (plan.reserved_bytes - around) / GIB)
    yield _row(f"{name}, least", "GiB", found.minimum_bytes / GIB, (plan.minimum_bytes - around) / GIB)


def patience_rows() -> Iterator[Row]:
    """Yield the limits that a person's patience sets beside what planning takes, medians in milliseconds."""
    model, device = "meta-llama/Llama-3.1-8B", card_device(CARD_24)
    with tempfile.TemporaryDirectory() as folder, Tracer() as tracer:
        shutil.copy(config_path(model, None), Path(folder, "config.json"))
        large = RunSpec(model=folder, sequence_length=4096)
        small = large.model_copy(update={"quantization": "nf4", "chunked_loss": True, "sequence_length": 1024})
        for name, spec in {"fits": small, "does not fit": large}.items():
            yield _row(f"a plan that {name}", "ms", 20, _wait_ms(spec, lambda moved: make_plan(moved, card=CARD_24)))
        shape = read_shape(folder)
        yield _row("Fit to budget", "ms", 3000, _wait_ms(large, lambda moved: fit_spec(moved, shape, device)))
        yield _row("a trace, warm", "ms", 1500, _wait_ms(small, lambda moved: tracer.trace(moved, device)))


def _wait_ms(spec: RunSpec, act: Callable[[RunSpec], Any]) -> float:
    """Return the median of what `act` takes as the density of a spec moves, after one that warms up."""
    taken = []
    for step in range(8):
        begun = time.perf_counter()
        act(spec.model_copy(update={"density": 0.01 + step / 1000}))
        taken.append(time.perf_counter() - begun)
    return 1000 * statistics.median(taken[1:])


TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    "trace": trace_rows,
    "formulas": formula_rows,
    "reserved": reserved_rows,
    "sift": sift_rows,
    "spiel": spiel_rows,
    "peft": peft_rows,
    "patience": patience_rows,
}


def main() -> None:
    """Print the tables that are asked for; all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object: table -> rows")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    done = {}
    for name in [options.table] if options.table else TABLES:
        done[name] = []
        for row in TABLES[name]():
            done[name].append(row)
            if not options.json:
                print(_line(row), flush=True)
        if not options.json and name != "patience":
            _print_error(done[name])
    if options.json:
        print(json.dumps(done))


def _line(row: Row) -> str:
    figures = f"{row['ours']:>14,.2f} {row['unit']}"
    if "known" in row:
        return f"{row['name']:<44}{row['known']:>14,.2f}{figures}   ratio {row['ratio']:.4f}"
    return f"{row['name']:<44}{'':>14}{figures}   {row.get('phase', '')}"


def _print_error(rows: list[Row]) -> None:
    errors = [abs(row["ratio"] - 1) for row in rows if "ratio" in row]
    print(f"mean absolute error {100 * statistics.mean(errors):.2f} percent, largest {100 * max(errors):.2f} percent\n")


if __name__ == "__main__":
    main()
