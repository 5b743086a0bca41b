"""Setup: what to tune on the left, what it will need on the right, recomputed at every change."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import gradio as gr

from engine import hardware, presets
from engine.spec import METHODS, Method, RunSpec, about
from engine.units import GIB
from sparse_ui import cards, form
from sparse_ui.context import AppContext
from sparse_ui.messages import guarded
from sparse_ui.tabs.measure import Measure, draw_measure, wire_measure
from sparse_ui.tabs.plan_card import QUIET, draw_plan_card, wire_plan_card, wire_start

# Widgets of the accordions, by the group of their field. The Data tab shows the group `data`.
_ACCORDIONS = (
    ("The method in detail", ("method",)),
    ("Training, schedule and evaluation", ("optimizer", "training", "evaluation", "run")),
    (cards.FOLDED_MEMORY, ("model", "memory")),
)
_UPLOADS = [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz"]
_TO_DENSITY = "(power) => Number(Math.pow(10, power).toPrecision(2))"
_TO_POWER = "(density) => density > 0 ? Math.max(-5, Math.min(0, Math.log10(density))) : -5"
_BUDGET_STEP = 0.25  # GiB
OWN_FIELDS = tuple(name for name in RunSpec.model_fields if about(name).methods)


@dataclass(frozen=True)
class SetupTab:
    """What the layout wires to other tabs. `started` holds the id of the run that the button started."""

    tab: gr.Tab
    dataset_facts: gr.HTML
    started: gr.State


@dataclass(frozen=True)
class _Main:
    """The left side, beside the widgets of the form."""

    preset: gr.Dropdown
    upload: gr.UploadButton
    dataset_facts: gr.HTML
    model_facts: gr.HTML
    method_words: gr.HTML
    density_words: gr.HTML
    budget_words: gr.HTML


def build_setup_tab(context: AppContext, widgets: dict[str, Any], load: Callable[..., Any]) -> SetupTab:
    """Build the tab.

    Args:
        context: of the app.
        widgets: of the form, by name, not yet drawn.
        load: of the Blocks, called with what to do when a page opens.
    """
    with gr.Tab("Setup", id="setup") as tab, gr.Row(elem_id="setup-grid", elem_classes="st-grid"):
        with gr.Column(elem_classes="st-card"):
            main = _draw_main(widgets)
            measure = _draw_accordions(widgets)
        card = draw_plan_card()
        started = gr.State(None)
    filled = _wire_form(context, main, widgets, load)
    wire_measure(context, measure, widgets["device"])
    facts = [main.model_facts, main.density_words, main.budget_words]
    wire_plan_card(context, card, widgets, facts, measure.measured, filled)
    wire_start(context, card, widgets, started)
    return SetupTab(tab, main.dataset_facts, started)


def _wire_form(context: AppContext, main: _Main, widgets: dict[str, Any], load: Callable[..., Any]) -> list[Any]:
    """Wire what fills the form; return the events that fill all of it."""
    fields = [widgets[name] for name in form.WIDGETS]

    @guarded("loading the preset")
    def fill(preset: str) -> list[Any]:
        return form.fill_form(presets.load_preset(preset))

    @guarded("opening the page")
    def open_page() -> list[Any]:
        return [context.settings.preset, *fill(context.settings.preset)]

    @guarded("keeping the upload")
    def keep(path: str) -> str:
        return keep_upload(Path(path), context.settings.runs_root)

    filled = [
        load(open_page, None, [main.preset, *fields], **QUIET),
        main.preset.input(fill, main.preset, fields, **QUIET),
    ]
    main.upload.upload(keep, main.upload, widgets["dataset"])
    method, own = widgets["method"], [widgets[name] for name in OWN_FIELDS]
    method.change(_show_method, method, [main.method_words, *own], **QUIET)
    targets, patterns = widgets["targets"], widgets["target_patterns"]
    targets.change(lambda choice: gr.update(visible=choice == form.PATTERNS), targets, patterns, **QUIET)
    return filled


def _show_method(method: str) -> list[Any]:
    """Say what the method does, and show the fields that only it reads."""
    shown = form.own_fields(method)
    words = METHODS[cast(Method, method)]
    return [
        f"<span>{escape(words[0].upper() + words[1:])}</span>",
        # Out of sight and still there: a number without a value that is taken away comes back as 0.
        *(gr.update(visible=True if name in shown else "hidden") for name in OWN_FIELDS),
    ]


def _draw_main(widgets: dict[str, Any]) -> _Main:
    with gr.Row(elem_classes="st-headline"):
        gr.HTML(f'<div class="st-headline-words">{cards.title("What to tune")}<span class="soft">Preset</span></div>')
        preset = gr.Dropdown([*presets.list_presets()], label="Preset", show_label=False, elem_id="preset")
    widgets["model"].render()
    model_facts = gr.HTML(elem_classes="st-facts")
    with gr.Row(elem_classes="st-with-button"):
        widgets["dataset"].render()
        upload = gr.UploadButton("Upload", file_types=_UPLOADS, size="md", elem_id="upload")
    dataset_facts = gr.HTML(elem_classes="st-facts")
    widgets["method"].render()
    method_words = gr.HTML(elem_classes="st-facts")
    with gr.Row(elem_classes="st-two"):
        for name in OWN_FIELDS:
            if name in form.MAIN:
                widgets[name].render()
    for name in ("quantization", "targets", "target_patterns"):
        widgets[name].render()
    density_words = _draw_density(widgets["density"])
    budget_words = _draw_budget(widgets["budget_gib"])
    with gr.Row(elem_classes="st-three"):
        for name in ("sequence_length", "micro_batch_size", "gradient_accumulation"):
            widgets[name].render()
    return _Main(preset, upload, dataset_facts, model_facts, method_words, density_words, budget_words)


def _draw_density(number: Any) -> gr.HTML:
    with gr.Row(elem_classes="st-measure"):
        words = gr.HTML(cards.measure(about("density").label, ""))
        slider = gr.Slider(-5, 0, step=0.01, label="Density, power of ten", elem_classes="st-slide", show_label=False)
        number.render()
    slider.input(None, slider, number, js=_TO_DENSITY)
    number.change(None, number, slider, js=_TO_POWER)
    return words


def _draw_budget(number: Any) -> gr.HTML:
    total = max(0.5, round(hardware.resolve_device("auto").total_bytes / GIB, 2))
    end = math.ceil(total / _BUDGET_STEP) * _BUDGET_STEP  # stands for all there is, which is seldom a whole step
    with gr.Row(elem_classes="st-measure"):
        words = gr.HTML(cards.measure(about("budget_gib").label, ""))
        slider = gr.Slider(
            _BUDGET_STEP, end, value=end, step=_BUDGET_STEP, label="GiB", elem_classes="st-slide", show_label=False
        )
        number.render()
    slider.input(None, slider, number, js=f"(value) => Math.min(value, {total})")
    number.change(None, number, slider, js=f"(value) => value && value < {total} ? value : {end}")
    return words


def _draw_accordions(widgets: dict[str, Any]) -> Measure:
    """Draw the fields that stand folded, and under the last of them the button that measures this computer."""
    for heading, groups in _ACCORDIONS:
        names = [name for name in RunSpec.model_fields if name in widgets and about(name).group in groups]
        with gr.Accordion(heading, open=False, elem_classes="st-more") as accordion, gr.Row(elem_classes="st-two"):
            for name in names:
                if name not in form.MAIN:
                    widgets[name].render()
    with accordion:
        return draw_measure()


def keep_upload(source: Path, root: Path) -> str:
    """Copy an uploaded file to a place that lasts, beside the runs, and return it."""
    folder = root / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        target = folder / (source.name if number == 1 else f"{source.stem}-{number}{source.suffix}")
        if not target.exists():
            break
    shutil.copyfile(source, target)
    return str(target)
