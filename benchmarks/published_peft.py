"""GPU memory that PEFT's own comparison of methods measured, against the plan of the same steps.

huggingface/peft, method_comparison/MetaMathQA at commit 5d602fdb: Llama-3.2-3B in bf16, four rows a step, nothing
checkpointed, 5,000 steps on an L40S with PyTorch 2.13.0 and transformers 5.13.1; `accelerator_memory_max` is the most
that the caching allocator reserved. What is not published is the longest batch: of at most 768 tokens, and the same for
all methods. It is taken from the first reading, and the others are held out. Adapters of other kinds, and full
fine-tuning without fp32 masters, are no methods of this program.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.random_models import config_folder
from engine.hardware import Device
from engine.planner.estimate import estimate
from engine.planner.shape import read_shape
from engine.planner.trace_worker import trace_spec
from engine.spec import RunSpec
from engine.units import GIB

MODEL = "meta-llama/Llama-3.2-3B"
CARD = Device("cuda:0", "a card of 48 GiB", 48 * GIB, 48 * GIB)
ROWS, LONGEST, STEP = 4, 768, 8  # rows a step; tokens; step of the search
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Reading(NamedTuple):
    """The bytes that were reserved at most, of a run with these fields."""

    reserved_bytes: int
    fields: Mapping[str, Any]


READINGS: Mapping[str, Reading] = {
    "LoRA 32": Reading(22_292_725_760, {"method": "lora", "lora_rank": 32, "targets": ("q_proj", "v_proj")}),
    "LoRA 64": Reading(22_552_772_608, {"method": "lora", "lora_rank": 64, "targets": ("q_proj", "v_proj")}),
    "LoRA 10, MLP": Reading(24_698_159_104, {"method": "lora", "lora_rank": 10, "targets": _ALL[4:]}),
    "IA3": Reading(23_234_347_008, {"method": "ia3", "targets": ("k_proj", "v_proj", "down_proj")}),
    "IA3, all": Reading(26_145_193_984, {"method": "ia3", "targets": _ALL}),
}


def longest_batch(folder: str) -> int:
    """Return the tokens of a row with which the plan of the first reading comes nearest to it."""
    first = next(iter(READINGS.values()))
    lengths = range(LONGEST // 2, LONGEST + 1, STEP)
    return min(lengths, key=lambda length: abs(planned_bytes(folder, length, first) - first.reserved_bytes))


def rows() -> Iterator[tuple[str, int, int]]:
    """Yield name, measured bytes and ours: of the closed forms, then of a trace with the allocator replayed."""
    with config_folder(MODEL) as folder:
        length = longest_batch(folder)
        for number, (name, reading) in enumerate(READINGS.items()):
            kind = "held out" if number else f"gives {length} tokens a row"
            yield f"{name}, {kind}", reading.reserved_bytes, planned_bytes(folder, length, reading)
            traced = trace_spec(_spec(folder, length, reading), CARD).reserved_bytes
            yield f"{name}, traced", reading.reserved_bytes, traced


def planned_bytes(folder: str, length: int, reading: Reading) -> int:
    """Return what the closed forms say is reserved by a run of `reading` on rows of `length` tokens."""
    return estimate(_spec(folder, length, reading), read_shape(folder), CARD).reserved_bytes


def _spec(folder: str, length: int, reading: Reading) -> RunSpec:
    fixed = {"sequence_length": length, "micro_batch_size": ROWS, "gradient_accumulation": 1, "dtype": "bfloat16"}
    return RunSpec(model=folder, **fixed, **reading.fields)
