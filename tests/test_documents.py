"""What the documents say is true."""

import re
from pathlib import Path

import pytest

from engine.spec import RunSpec

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(RunSpec.model_fields))
def test_readme_names_every_field(name: str) -> None:
    assert f"`{name}`" in README


def test_readme_names_no_file_that_is_not_there() -> None:
    named = re.findall(r"`((?:engine|sparse_ui|presets|tests|benchmarks|docs)/[\w./-]+)`", README)
    pictures = re.findall(r"\]\((docs/[\w./-]+)\)", README)
    missing = [path for path in {*named, *pictures} if not (PROJECT / path).exists()]
    assert not missing


@pytest.mark.parametrize("ending", [r"python app\.py --demo", "python -m pytest"])
def test_readme_has_the_quick_start_lines(ending: str) -> None:
    assert re.search(rf"^[^#\n]*pip install .*{ending} *$", README, re.MULTILINE)
