"""What the tabs show, as plain functions over a run folder or the values of the form."""

import time
from pathlib import Path

import gradio as gr
import pytest

from engine import runs
from engine.events import Evaluated, EventWriter, RunState, Sample, Stepped
from engine.planner.cards import CARDS
from engine.planner.plan import Remedy
from engine.runs import Run, RunStatus
from engine.spec import RunSpec
from sparse_ui.context import AppContext, Settings
from sparse_ui.form import WIDGETS, fill_form
from sparse_ui.header import header_html, status_words
from sparse_ui.history import HistoryReader
from sparse_ui.plan_view import FitView, shown_remedies, view_plan
from sparse_ui.runs_view import details, runs_table
from sparse_ui.tabs.chat import _answered
from sparse_ui.tabs.data import view_data
from sparse_ui.tabs.plan_card import _show_fit
from sparse_ui.tabs.setup import keep_upload
from sparse_ui.tabs.train import build_train_tab
from sparse_ui.train_view import peak_words, pieces_of

SPEC = RunSpec(model="demo", dataset="demo/pirate", sequence_length=64)


def _step(step: int) -> Stepped:
    return Stepped(step, 4, 1.0, 1e-4, 0.5, 900.0, 2 << 20, 3 << 20, 1.0, 9.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = runs.create_run(SPEC.model_copy(update={"output": str(tmp_path)}), {"peak_bytes": 4 << 20})
    writer = EventWriter(made.events_path)
    for event in (Evaluated(0, 2.0, 0.0, (Sample("Where?", "Here.", "There."),)), _step(1), _step(2)):
        writer.write(event)
    writer.close()
    runs.write_status(made, RunStatus("running", step=2, total_steps=4, remaining_s=90))
    return made


def test_a_step_changes_loss_and_memory_but_not_the_probes(run: Run) -> None:
    reader = HistoryReader()
    before = {piece.name: piece.version for piece in pieces_of(run, reader.read(run))}
    writer = EventWriter(run.events_path)
    writer.write(_step(3))
    writer.close()
    after = {piece.name: piece.version for piece in pieces_of(run, reader.read(run))}
    changed = {name for name in before if before[name] != after[name]}
    assert {"loss", "memory"} <= changed
    assert not changed & {"coverage", "gradient", "samples", "said"}


def test_a_tick_without_news_sends_nothing(run: Run) -> None:
    with gr.Blocks(analytics_enabled=False), gr.Tabs():
        tab = build_train_tab(AppContext(Settings(run.path.parent)))
    page = tab.show(None, {})[-1]
    assert tab.show(run.id, page) == [gr.skip()] * len(tab.outputs)


def test_a_page_that_opens_finds_the_run(run: Run) -> None:
    with gr.Blocks(analytics_enabled=False), gr.Tabs():
        tab = build_train_tab(AppContext(Settings(run.path.parent)))
    shown = tab.show(None, {})
    assert "step 2 of 4" in shown[0]
    assert shown[tab.outputs.index(tab.run_id)]["value"] == run.id


def test_header_names_state_step_and_time_left(run: Run) -> None:
    assert "Training · step 2 of 4 · 1 min 30 s left" in header_html(AppContext(Settings(run.path.parent)))


def test_every_state_has_words() -> None:
    for state in ("queued", "preparing", "running", "stopping", "finished", "stopped", "failed"):
        status = RunStatus(state, step=1, total_steps=2, detail="Waiting for another run.")
        assert status_words(status).lower()[:4] in (state[:4], "trai")
    assert status_words(RunStatus("queued")) == "Starting"  # nobody is waited for


@pytest.mark.parametrize("state", ["stopping", "stopped", "failed"])
def test_no_state_counts_steps_before_there_are_any(state: RunState) -> None:
    assert "step 0" not in status_words(RunStatus(state))


def test_a_damaged_run_keeps_its_row(run: Run) -> None:
    (run.path / "spec.yaml").write_text("density: [")
    assert "unreadable" in runs_table(HistoryReader(), [run], [run.id])


def test_a_failed_run_says_why(run: Run) -> None:
    run.log_path.write_text("last words\n")
    runs.write_status(run, RunStatus("failed", detail="The loss is not a number."))
    text = details(HistoryReader(), run)
    assert "The loss is not a number." in text
    assert "last words" in text


def test_peak_stands_against_the_plan_in_one_unit() -> None:
    assert peak_words(3 << 20, {"peak_bytes": 4 << 20}) == "3.0 MiB, planned 4.0"
    assert peak_words(3 << 20, {"peak_bytes": 4 << 30}) == "3.0 MiB, planned 4.0 GiB"
    assert peak_words(None, {"peak_bytes": 4 << 20}) == "planned 4.0 MiB"
    assert peak_words(None, {}) == "–"


def test_plan_card_shows_the_plan_quickly() -> None:
    values = fill_form(SPEC)
    first = view_plan(values, "runs")
    started = time.perf_counter()
    view_plan(values, "runs")
    assert time.perf_counter() - started < 0.2  # about 0.01 s on an idle core
    assert "fits" in first.card
    assert "values" in first.density_words


def test_the_change_that_is_enough_is_among_those_shown() -> None:
    few, most, none = (Remedy(verdict, 1, {}, "", verdict) for verdict in ("tight", "fits", "does not fit"))
    assert shown_remedies([none, none, none, few, most]) == (none, none, most)
    assert shown_remedies([none, none, none, few]) == (none, none, few)
    assert shown_remedies([none, most, none, most]) == (none, most, none)
    assert shown_remedies([few]) == (few,)


def test_a_plan_for_another_card_says_where_a_run_would_be() -> None:
    values = fill_form(SPEC)
    elsewhere = view_plan(values, "runs", CARDS[0].name).card
    assert "Start trains on this computer" in elsewhere
    assert f"known only for a device that was measured, and {CARDS[0].name} is not here." in elsewhere
    assert "Measure this computer" not in elsewhere
    assert "Start trains on this computer" not in view_plan(values, "runs").card


def test_what_is_still_to_be_typed_is_no_error() -> None:
    values = [
        ("patterns" if name == "targets" else value) for name, value in zip(WIDGETS, fill_form(SPEC), strict=True)
    ]
    assert '<div class="st-callout note" role="alert">Type under Patterns' in view_plan(values, "runs").card


def test_plan_card_shows_every_problem() -> None:
    wrong = {"density": 5, "epochs": -1}
    values = [wrong.get(name, value) for name, value in zip(WIDGETS, fill_form(SPEC), strict=True)]
    card = view_plan(values, "runs").card
    assert "For 5 percent write 0.05" in card
    assert "Epochs must be" in card


def test_data_shows_rows_though_another_field_is_wrong() -> None:
    values = [5 if name == "density" else value for name, value in zip(WIDGETS, fill_form(SPEC), strict=True)]
    summary, rows, facts = view_data(values, "runs")
    assert "demo/pirate" in summary
    assert "user" in rows
    assert "rows" in facts


def test_one_row_is_a_row(tmp_path: Path) -> None:
    single = tmp_path / "single.txt"
    single.write_text("Hello.")
    _, _, facts = view_data(fill_form(SPEC.model_copy(update={"dataset": str(single)})), "runs")
    assert "1 row ·" in facts


def test_what_a_fit_found_is_shown_only_for_the_form_it_is_of() -> None:
    found = FitView("NF4 fits", {"quantization": "nf4"}), ("a card", "demo", 0.05)
    html, button = _show_fit(found, "a card", "demo", 0.05)
    assert (html, button["visible"]) == ("NF4 fits", True)
    html, button = _show_fit(found, "a card", "demo", 0.01)
    assert (html, button["visible"]) == ("", False)


def test_data_says_what_is_wrong(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    summary, rows, _ = view_data(fill_form(SPEC.model_copy(update={"dataset": str(missing)})), "runs")
    assert str(missing) in summary
    assert rows == ""


def test_an_upload_never_replaces_an_earlier_one(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("one")
    first = keep_upload(source, tmp_path / "runs")
    source.write_text("two")
    second = keep_upload(source, tmp_path / "runs")
    assert [Path(kept).read_text() for kept in (first, second)] == ["one", "two"]


def test_a_question_that_was_stopped_before_its_answer_is_not_asked_again() -> None:
    first, answer, stopped, next_one = (
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"))
    )
    assert _answered([first, answer, stopped, next_one]) == [first, answer, next_one]
