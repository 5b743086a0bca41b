"""How long rows are said to be, against tokenising them all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.batches import prepare_data
from engine.data.row_counts import count_rows
from engine.errors import DatasetError, EngineError
from engine.models import load_tokenizer
from engine.spec import RunSpec

ROWS = 600


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """That of the demo model."""
    return load_tokenizer(RunSpec(model="demo"))


def _spec(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> RunSpec:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return RunSpec(**{"model": "demo", "dataset": str(file), "sequence_length": 256, **fields})


def _chats() -> list[dict[str, str]]:
    lengths = np.random.default_rng(0).geometric(0.1, ROWS)
    return [{"question": f"Why {number}?", "answer": "So it is. " * length} for number, length in enumerate(lengths)]


def test_few_rows_are_counted_exactly(tmp_path: Path, tokenizer: Any) -> None:
    spec = _spec(tmp_path, _chats())
    assert count_rows(spec, tokenizer, ROWS) == prepare_data(spec, tokenizer).row_lengths


@pytest.mark.parametrize("kind", ["chats", "texts", "labelled"])
def test_of_many_rows_a_part_tells(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    rows: list[dict[str, Any]] = list(_chats())
    if kind != "chats":
        labels = [{"label": number % 2} if kind == "labelled" else {} for number in range(len(rows))]
        rows = [{"text": row["answer"], **label} for row, label in zip(rows, labels, strict=True)]
    spec = _spec(tmp_path, rows, **({"task": "classification"} if kind == "labelled" else {}))
    found, true = count_rows(spec, tokenizer, 120), prepare_data(spec, tokenizer).row_lengths
    assert found.estimated
    assert found.longest == true.longest
    assert found.rows == pytest.approx(true.rows, rel=0.03)
    assert found.mean == pytest.approx(true.mean, rel=0.05)
    assert count_rows(spec, tokenizer, 120) == found


def test_where_rows_are_too_long_there_may_be_some_that_just_are_not(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*_chats(), *({"question": "why " * 400, "answer": "So."} for _ in range(60))]
    spec = _spec(tmp_path, rows, sequence_length=64)
    assert count_rows(spec, tokenizer, 100).longest == 64


def test_rows_that_say_nothing_are_no_error_but_where_there_is_no_other(tmp_path: Path, tokenizer: Any) -> None:
    nothing = [{"question": "Why?", "answer": ""}] * ROWS
    found = count_rows(_spec(tmp_path, [*_chats(), *nothing]), tokenizer, 300)
    assert found.rows == pytest.approx(0.95 * ROWS, rel=0.1)
    with pytest.raises(DatasetError, match=f"of {ROWS} rows, empty answer"):
        count_rows(_spec(tmp_path, nothing), tokenizer, ROWS)
    with pytest.raises(EngineError, match="Of 100 rows that were looked at none") as said:
        count_rows(_spec(tmp_path, nothing), tokenizer, 100)
    assert not isinstance(said.value, DatasetError)  # which would refuse the run: another row may do
