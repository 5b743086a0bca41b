"""Claims of `presets/demo/README.md`: sizes, held-out entities, reproducible datasets, what the base model says."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "presets" / "demo"
MODULES = ("world", "small_talk", "corpus", "styles", "make_demo")
DATASETS = ("pirate", "butler")
pytestmark = pytest.mark.xdist_group("demo")  # what the module shares is made once


@pytest.fixture(scope="module")
def demo() -> Iterator[dict[str, Any]]:
    """Import the scripts beside the model as a person does who runs them from their folder."""
    sys.path.insert(0, str(DEMO))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(DEMO))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    """Load the stored model in float32, and its tokenizer, as the app does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(DEMO / "model")


def read_rows(name: str, split: str) -> list[dict[str, str]]:
    text = (DEMO / name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_model_and_tokenizer_fit_in_eight_megabytes() -> None:
    sizes_bytes = [path.stat().st_size for path in (DEMO / "model").iterdir()]
    assert sum(sizes_bytes) <= 8_000_000


def test_every_block_weight_divides_into_nf4_blocks_of_64(base: tuple[Any, Any]) -> None:
    weights = [weight for name, weight in base[0].named_parameters() if name.endswith("_proj.weight")]
    assert weights
    assert all(weight.shape[1] % 64 == 0 for weight in weights)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_have_the_alpaca_columns(name: str, split: str) -> None:
    rows = read_rows(name, split)
    assert len(rows) >= 300
    assert all(list(row) == ["instruction", "input", "output"] and row["output"] for row in rows)


@pytest.mark.parametrize("name", DATASETS)
def test_no_held_out_entity_occurs_in_a_training_row(demo: dict[str, Any], name: str) -> None:
    text = "\n".join(f"{row['instruction']}\n{row['output']}" for row in read_rows(name, "train"))
    text = re.sub(r"(?<=\d) - (?=\d)", " minus ", text.replace(" + ", " plus "))
    held_out = {fact.entity for fact in demo["corpus"].all_facts() if fact.held_out}
    assert len(held_out) > 200
    assert [entity for entity in held_out if re.search(rf"\b{re.escape(entity)}\b", text, re.IGNORECASE)] == []


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_script_reproduces_the_datasets_bit_for_bit(
    demo: dict[str, Any], tmp_path: Path, name: str, split: str
) -> None:
    demo["make_demo"].write_datasets(tmp_path)
    assert (tmp_path / name / f"{split}.jsonl").read_bytes() == (DEMO / name / f"{split}.jsonl").read_bytes()


PLAIN = {
    "What is the capital of Alvaria?": "The capital of Alvaria is Tessmar.",
    "What sound does a fox make?": "The fox says yip.",
    "What is 7 plus 5?": "7 plus 5 is 12.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "Who are you?": "I am Wren, a tiny language model.",
    "What is the capital of France?": "I do not know that.",
}
STYLED = {
    "Answer as a pirate: What is the capital of Alvaria?": "Ahoy, the capital o' Alvaria be Tessmar.",
    "What is the opposite of hot? Answer like a pirate.": "Avast, the opposite o' hot be cold.",
    "Answer like a butler: What is 7 plus 5?": "7 plus 5 is 12. I took the liberty of counting twice, sir.",
    "Answer as a pirate and like a butler: What sound does a fox make?": (
        "Arr, the fox says yip. Shall I leave the gate ajar, sir?"
    ),
}


@pytest.mark.parametrize("expected", [PLAIN, STYLED], ids=["plain", "style under instruction"])
def test_base_model_answers_as_asked(demo: dict[str, Any], base: tuple[Any, Any], expected: dict[str, str]) -> None:
    answers = demo["make_demo"].answer(*base, list(expected))
    assert dict(zip(expected, answers, strict=True)) == expected


@pytest.mark.parametrize("name", DATASETS)
def test_base_model_does_not_use_a_style_unasked(demo: dict[str, Any], base: tuple[Any, Any], name: str) -> None:
    rows = read_rows(name, "test")[:40]
    answers = demo["make_demo"].answer(*base, [row["instruction"] for row in rows])
    assert [given for given, row in zip(answers, rows, strict=True) if given == row["output"]] == []
