"""What the app says to the commonest mistakes: what the command line says, with the form's labels; no traceback."""

import html
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.presets import bundled_models
from engine.spec import RunSpec
from sparse_ui.chat_desk import ChatDesk
from sparse_ui.form import WIDGETS, fill_form
from sparse_ui.plan_view import view_plan
from sparse_ui.tabs.data import view_data
from sparse_ui.tabs.plan_card import _start


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_TUNING_HUB", "offline")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def _form(**changes: Any) -> list[Any]:
    values = dict(zip(WIDGETS, fill_form(RunSpec(model="demo", dataset="demo/pirate")), strict=True))
    return list({**values, **changes}.values())


def _started(folder: Path, **changes: Any) -> str:
    """Press Start with the given values in the form; return what the page says below the button."""
    *_, (said, _) = _start(ChatDesk(), str(folder))(*_form(**changes))
    assert not list(folder.glob("*/spec.yaml")), "a run was made"
    assert "Traceback" not in said
    return html.unescape(said)


def test_density_of_five(tmp_path: Path) -> None:
    assert "Density must be in (0, 1], got 5. For 5 percent write 0.05." in _started(tmp_path, density=5)
    assert "Density must be in (0, 1], got 5." in html.unescape(view_plan(_form(density=5), str(tmp_path)).card)


def test_all_problems_are_shown_together(tmp_path: Path) -> None:
    card = view_plan(_form(density=5, micro_batch_size=0), str(tmp_path)).card
    assert "Density must be" in card
    assert "Micro-batch must be" in card


def test_hub_out_of_reach(tmp_path: Path) -> None:
    said = _started(tmp_path, model="nobody/nothing")
    assert "The Hugging Face Hub did not answer within 3 s, and model 'nobody/nothing' is not on this computer." in said


def test_model_folder_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(bundled_models()["demo"] / "config.json", folder)
    assert "has a config.json but no weights (*.safetensors)" in _started(tmp_path / "runs", model=str(folder))


def test_budget_too_small(tmp_path: Path) -> None:
    said = _started(tmp_path, budget_gib=0.1)
    assert "This run needs about" in said
    assert "the budget is 102.4 MiB" in said


def test_dataset_without_usable_column(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    summary, _, _ = view_data(_form(dataset=str(tmp_path / "odd.jsonl")), str(tmp_path))
    assert "has no column to train on: found a, b." in html.unescape(summary)
