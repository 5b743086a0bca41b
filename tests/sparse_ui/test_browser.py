"""The demo in a browser: one person, from the first point to an answer."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from engine import runs, workers
from sparse_ui.form import WIDGETS

PROJECT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Milliseconds, on two slow cores with other tests beside these.
PATIENT_MS, TRAIN_MS, CHAT_MS = 60_000, 120_000, 120_000
expect.set_options(timeout=PATIENT_MS)
POINTS = "#plot-loss .scatterlayer .trace"
PLOTS, DRAWN = "[id^=plot-] .js-plotly-plot", ".main-svg"
pytestmark = [
    pytest.mark.ui,
    pytest.mark.xdist_group("browser"),  # one browser at a time
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this computer"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that remembers nothing of those before it."""
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(PATIENT_MS)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of `address` lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the app is found."""
    with _served(folder) as where:
        yield where


@contextmanager
def _served(folder: Path, *arguments: str) -> Iterator[str]:
    """Run the app over the runs in `folder`; yield its address. What still trains is stopped at the end."""
    command = [sys.executable, "app.py", "--port", "0", "--no-browser", "--runs", str(folder), *arguments]
    app = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        assert app.stdout is not None
        line = app.stdout.readline()
        match = re.fullmatch(r"Sparse tuning is at (http://127\.0\.0\.1:\d+)\n", line)
        assert match, line
        yield match[1]
    finally:  # also where the body fails: an app that stays would slow down all tests after it
        app.terminate()
        app.wait(20)
        for run in runs.list_runs(folder):
            runs.send_request(run, "stop")
            workers.wait_for_end(run)


@contextmanager
def _held(page: Page, belongs: Callable[[dict[str, Any]], bool]) -> Iterator[list[Route]]:
    """Hold back the page's events that `belongs` picks until the body is done, as a busy computer might."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        if belongs(json.loads(route.request.post_data or "{}")):
            held.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", hold)
    yield held
    page.unroute("**/queue/join*")  # which lets go of them


def _send(page: Page, question: str) -> None:
    page.locator("#chat-box textarea").fill(question)
    page.locator("#chat-send").click()


def _ask(page: Page, question: str) -> None:
    page.get_by_role("tab", name="Chat", exact=True).click()
    expect(page.locator("#chat-box textarea")).to_be_visible()
    _send(page, question)
    expect(page.locator("#chat-base")).to_contain_text(question)


def _expect_answers(page: Page) -> None:
    for side in ("base", "tuned"):
        expect(page.locator(f"#chat-{side} [data-testid=bot]")).to_have_text(re.compile(r"\w"), timeout=CHAT_MS)


def test_train_reload_stop_and_chat(page: Page, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with _served(tmp_path, "--demo") as address:
        page.goto(address)
        _watch_reload_and_stop(page, tmp_path)
        with _held(page, lambda event: (event.get("event_data") or {}).get("value") == "Chat") as listing:
            _ask(page, "Where is the cat?")
            assert listing  # asked before the list of results was there
        _ask_while_the_model_loads(page)
        _take_away(page)
    assert not errors
    assert len(list(tmp_path.glob("*-merged/model.safetensors"))) == 1


def _ask_while_the_model_loads(page: Page) -> None:
    with _held(page, lambda event: not event["data"]) as ends:  # Stop has not come to the app yet
        page.locator("#chat-stop").click()
        _send(page, "Where does a fox live?")
        page.wait_for_timeout(500)
        assert ends
    expect(page.locator("#chat-base")).to_contain_text("fox")
    _ask(page, "Where is the moon?")
    for side in ("base", "tuned"):
        expect(page.locator(f"#chat-{side} [data-testid=user]")).to_have_count(3)
        expect(page.locator(f"#chat-{side} [data-testid=bot]")).to_have_count(2, timeout=CHAT_MS)
    _expect_nothing_typed_to_be_lost(page)


def _expect_nothing_typed_to_be_lost(page: Page) -> None:
    box = page.locator("#chat-box textarea")
    with _held(page, lambda event: len(event["data"]) == 6) as questions:
        _send(page, "What does a baker do?")
        page.wait_for_timeout(500)
        box.fill("Count the legs of")
        assert questions
    expect(page.locator("#chat-base")).to_contain_text("baker")
    expect(box).to_have_value("Count the legs of")
    with _held(page, lambda event: not event["data"]) as ends:
        page.locator("#chat-clear").click()
        _send(page, "Count the legs of the cow.")
        page.wait_for_timeout(500)
        assert ends
    for side in ("base", "tuned"):
        expect(page.locator(f"#chat-{side} [data-testid=bot]")).to_have_count(1, timeout=CHAT_MS)
        expect(page.locator(f"#chat-{side} [data-testid=user]")).to_have_text("Count the legs of the cow.")
    expect(box).to_have_value("")
    _send(page, "What is this? " * 1_000)  # more than the model reads
    expect(page.locator("#chat-said")).to_contain_text("tokens long")
    expect(box).to_have_value("What is this? " * 1_000)


def _take_away(page: Page) -> None:
    page.get_by_role("tab", name="Runs", exact=True).click()
    row = page.locator("[data-run]")
    row.locator(".tick").click()
    expect(row).not_to_have_attribute("aria-selected", "true")
    expect(page.locator("#resume")).to_be_disabled()
    for _ in range(2):  # a click chooses, and chooses again
        row.click()
        expect(row).to_have_attribute("aria-selected", "true")
    page.locator("#export").click()
    expect(page.locator("#export-said")).to_contain_text("Merged model (float32): ", timeout=TRAIN_MS)


def _watch_reload_and_stop(page: Page, folder: Path) -> None:
    expect(page.locator("#tabs")).to_be_visible()
    expect(page.locator(POINTS).first).to_be_visible(timeout=TRAIN_MS)
    run = runs.list_runs(folder)[0]

    page.reload()
    expect(page.locator(POINTS).first).to_be_visible(timeout=TRAIN_MS)
    expect(page.locator("#train-run input")).to_have_value(run.id)
    assert runs.read_status(run).is_live

    page.get_by_role("tab", name="Setup", exact=True).click()
    expect(page.locator(f"#plot-loss {DRAWN}").first).to_have_attribute("width", "700")  # anew, where it has no width
    page.locator("#stop").dispatch_event("click")
    expect(page.locator("#header-state")).to_contain_text("Idle", timeout=TRAIN_MS)
    page.get_by_role("tab", name="Train", exact=True).click()
    expect(page.locator("#progress")).to_contain_text("Stopped", timeout=TRAIN_MS)
    page.wait_for_function(f"""[...document.querySelectorAll("{PLOTS}")].every(
        plot => Math.abs(plot.querySelector("{DRAWN}").getBoundingClientRect().width - plot.clientWidth) <= 1)""")


def test_a_method_left_and_taken_again_and_a_dark_page_stay_as_they_were(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_text("The method in detail").click()
    page.get_by_label("LoRA", exact=True).check()
    expect(page.locator("#field-selection_micro_steps")).to_be_hidden()
    page.get_by_label("SIFT", exact=True).check()
    expect(page.locator("#field-selection_micro_steps input")).to_have_value("")
    expect(page.locator("#plan .st-pill")).to_have_text("fits")
    expect(page.locator("#field-magnitude")).to_be_hidden()
    page.locator("#theme-toggle").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    page.reload()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))


def test_a_narrow_page_shows_the_state_and_a_list_closes_behind_the_keyboard(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(address)
    expect(page.locator("#header-state .state")).to_be_in_viewport()
    page.locator("#field-model input").focus()
    expect(page.locator("#field-model [role=listbox]")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#field-dataset input")).to_be_focused()
    expect(page.locator("#field-model [role=listbox]")).to_be_hidden()


def test_what_start_says_stays_though_the_plan_comes_later(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#plan .st-pill")).to_have_text("fits")
    page.get_by_text("Training, schedule and evaluation").click()
    rate = page.locator("#field-learning_rate input")
    with _held(page, lambda event: len(event["data"]) == len(WIDGETS) + 1) as plans:  # of the form and a card
        rate.fill("0.1")
        rate.fill("-2")
        page.locator("#start").click()
        expect(page.locator("#start-said")).to_contain_text("got -2")
        assert plans
    expect(page.locator("#plan")).to_contain_text("got -2")
    page.wait_for_timeout(1_000)
    expect(page.locator("#start-said")).to_contain_text("got -2")
    rate.fill("0.1")
    expect(page.locator("#start-said")).not_to_contain_text("got -2")


def test_a_family_that_no_formula_knows_is_traced_while_one_looks(page: Page, address: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}))
    page.goto(address)
    expect(page.locator("#plan .st-pill")).to_have_text("fits")
    model = page.locator("#field-model input")
    model.fill(str(tmp_path / "bloom"))
    model.press("Enter")
    expect(page.locator("#plan")).to_contain_text("exact figures come in a moment")
    expect(page.locator("#plan")).to_contain_text("the figures are those of a trace of its code")
    expect(page.locator("#plan")).not_to_contain_text("in a moment")


def test_spiel_over_nf4_from_click_to_chat(page: Page, address: str, folder: Path) -> None:
    page.goto(address)
    expect(page.locator("#plan .st-pill")).to_have_text("fits")  # the form is filled
    page.get_by_label("SpIEL-AG").check()
    expect(page.locator("#field-period")).to_be_visible()
    page.get_by_label("NF4").check()
    page.get_by_text("Training, schedule and evaluation").click()
    page.locator("#field-max_steps input").fill("25")
    page.locator("#field-evaluation_rows input").fill("16")
    page.locator("#field-exact_match_rows input").fill("0")
    page.locator("#start").click()
    expect(page.locator("#progress")).to_contain_text("Finished", timeout=2 * TRAIN_MS)
    run = runs.list_runs(folder)[0]
    assert (runs.read_spec(run).method, runs.read_spec(run).quantization) == ("spiel-ag", "nf4")
    assert runs.read_report(run)["steps"] == 25
    _ask(page, "Where does a fox live?")
    _expect_answers(page)
