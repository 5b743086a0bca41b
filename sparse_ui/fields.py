"""Builds the widget of each field of a spec; label, unit and help come from the schema."""

from typing import Any, get_args

import gradio as gr
from gradio.components import Component

from engine.presets import bundled_datasets, bundled_models
from engine.spec import RunSpec, about, choices
from sparse_ui.form import MAIN, PATTERNS, is_text, label_of

SEGMENTS = 4  # a choice of up to so many words is a row of segments, a longer one a list; the methods are rows
_LETTERS = 22  # most that segments half the form wide have room for
_TARGET_WORDS = {"linear": "all linear", "all": "everything"}
BESIDE_SLIDER = ("density", "budget_gib")  # a slider carries their label
_FINE = 0.001  # what one click on the arrows of a number adds
EXPLAINED = tuple(name for name in RunSpec.model_fields if about(name).methods)  # of the main fields
WORDS = {
    "sift": "SIFT",
    "random": "Random",
    "magnitude": "Magnitude",
    "fisher": "Fisher",
    "spiel-ag": "SpIEL-AG",
    "spiel-ma": "SpIEL-MA",
    "lora": "LoRA",
    "ia3": "IA3",
    "full": "Full",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "nf4": "NF4",
    "none": "not quantised",
    "adamw": "AdamW",
    "sgd": "SGD",
    "8bit": "8 bit",
    "rows_x_columns": "rows × columns",
}


def word_of(choice: str) -> str:
    """Return how a choice is written on the screen."""
    return WORDS.get(choice, choice)


def build_widget(name: str) -> Component:
    """Return the widget of a field, unset; `name` is a field of RunSpec, or `target_patterns`."""
    if name == "target_patterns":
        return gr.Textbox(
            label="Patterns", placeholder="q_proj, model.layers.1?.*", elem_id="field-target_patterns", visible=False
        )
    options: dict[str, Any] = {"label": label_of(name), "elem_id": f"field-{name}"}
    if name in BESIDE_SLIDER:
        options["show_label"] = False
    elif name not in MAIN or name in EXPLAINED:
        options["info"] = about(name).help
    if name in ("model", "dataset"):
        known = bundled_models() if name == "model" else bundled_datasets()
        return gr.Dropdown([*known], allow_custom_value=True, **options)
    if is_text(name):
        return gr.Textbox(max_lines=1, **options)
    if words := choices(name):
        return _choice(name, words, options)
    if RunSpec.model_fields[name].annotation is bool:
        return gr.Checkbox(**options)
    whole = "int" in str(RunSpec.model_fields[name].annotation)
    return gr.Number(placeholder=_when_empty(name), step=1 if whole else _FINE, **options)


def _choice(name: str, words: tuple[str, ...], options: dict[str, Any]) -> Component:
    if name == "targets":
        offered = [*((_TARGET_WORDS.get(word, word), word) for word in words), (PATTERNS, PATTERNS)]
    else:
        offered = [(word_of(word), word) for word in words]
    if name == "method" and len(offered) > SEGMENTS:
        return gr.Radio(offered, elem_classes=["st-seg", "st-seg-rows"], **options)
    if len(offered) <= SEGMENTS and (name in MAIN or sum(len(word) for word, _ in offered) <= _LETTERS):
        return gr.Radio(offered, elem_classes="st-seg", visible=len(offered) > 1, **options)
    return gr.Dropdown(offered, **options)


def _when_empty(name: str) -> str | None:
    return "not set" if type(None) in get_args(RunSpec.model_fields[name].annotation) else None
