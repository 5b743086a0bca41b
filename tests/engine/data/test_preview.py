"""A first look at a dataset says how it is read, and loads no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.data.preview import preview_dataset
from engine.spec import RunSpec

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
import sys
from engine.data.preview import preview_dataset
from engine.spec import RunSpec
preview = preview_dataset(RunSpec(model="demo", dataset=sys.argv[1]))
print(preview.rows, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_preview_counts_and_shows_rows(write: Any) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}" if number % 2 else ""} for number in range(10)]
    preview = preview_dataset(RunSpec(model="demo", dataset=write("a.jsonl", rows), evaluation_fraction=0.2), rows=2)
    assert (preview.format, preview.columns) == ("instruction", {"instruction": "question", "output": "answer"})
    assert (preview.rows, preview.evaluation_rows, preview.checked_rows) == (10, 2, 8)
    assert preview.training_rows + preview.dropped["empty answer"] == 8
    assert [bool(item.answer) for item in preview.conversations] == [True, True]


def test_a_preview_loads_no_torch(write: Any, tmp_path: Path) -> None:
    path = write("a.jsonl", [{"text": "one"}, {"text": "two"}])
    probe = [sys.executable, "-c", PROBE, path]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    told = subprocess.run(probe, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout.split() == ["2", "False", "False"]


def test_a_preview_is_plain_data(write: Any) -> None:
    preview = preview_dataset(RunSpec(model="demo", dataset=write("a.txt", "one\ntwo\n")))
    assert json.dumps([item.text for item in preview.conversations]) == '["one\\ntwo"]'
