"""The page as a whole."""

import subprocess
import sys
from pathlib import Path

import gradio as gr

from engine.hardware import resolve_device
from engine.spec import RunSpec
from engine.units import GIB
from sparse_ui.context import AppContext, Settings
from sparse_ui.fields import build_widget
from sparse_ui.form import WIDGETS
from sparse_ui.layout import build_app


def test_the_interface_imports_no_torch() -> None:
    code = "import sys, sparse_ui.layout, sparse_ui.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_has_a_widget_with_its_label() -> None:
    assert set(RunSpec.model_fields) - {"output"} == set(WIDGETS) - {"target_patterns"}
    assert all(build_widget(name).label for name in WIDGETS)


def test_every_widget_of_the_form_is_on_the_page(tmp_path: Path) -> None:
    app = build_app(AppContext(Settings(tmp_path)))
    ids = {getattr(block, "elem_id", None) for block in app.blocks.values()}
    assert {f"field-{name}" for name in WIDGETS} <= ids


def test_nothing_is_offered_as_an_interface_for_programs(tmp_path: Path) -> None:
    app = build_app(AppContext(Settings(tmp_path)))
    assert {event.api_visibility for event in app.fns.values()} == {"private"}


def test_the_slider_of_the_budget_ends_in_a_step_that_holds_all_there_is(tmp_path: Path) -> None:
    app = build_app(AppContext(Settings(tmp_path)))
    sliders = [block for block in app.blocks.values() if isinstance(block, gr.Slider) and block.label == "GiB"]
    total = resolve_device("auto").total_bytes / GIB
    for slider in sliders:
        steps = (slider.maximum - slider.minimum) / slider.step
        assert steps == int(steps)
        assert total - 0.01 <= slider.maximum < total + slider.step
    assert len(sliders) == 1
