"""The demo in a browser: one person, from the first point to an answer."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from engine import runs, workers

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
TRAIN_S, CHAT_S = 60_000, 60_000  # milliseconds, on two slow cores
POINTS = "#plot-loss .scatterlayer .trace"
pytestmark = [pytest.mark.ui, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this computer")]


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "app.py", "--demo", "--port", "0", "--no-browser", "--runs", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    app = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    line = app.stdout.readline()
    match = re.fullmatch(r"Sparse tuning is at (http://127\.0\.0\.1:\d+)\n", line)
    assert match, line
    yield match[1]
    app.terminate()
    app.wait(20)
    for run in runs.list_runs(tmp_path):
        runs.send_request(run, "stop")
        workers.wait_for_end(run)


def test_train_reload_stop_and_chat(page: Page, address: str, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(page.locator("#tabs")).to_be_visible(timeout=20_000)
    expect(page.locator(POINTS).first).to_be_visible(timeout=TRAIN_S)
    run = runs.list_runs(tmp_path)[0]

    page.reload()
    expect(page.locator(POINTS).first).to_be_visible(timeout=TRAIN_S)
    expect(page.locator("#train-run input")).to_have_value(run.id)
    assert runs.read_status(run).is_live

    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped", timeout=TRAIN_S)

    page.get_by_role("tab", name="Chat", exact=True).click()
    expect(page.locator("#chat-run input")).to_have_value(run.id)
    page.locator("#chat-box textarea").fill("Where is the cat?")
    page.locator("#chat-send").click()
    for side in ("base", "tuned"):
        expect(page.locator(f"#chat-{side} [data-testid=bot]")).to_have_text(re.compile(r"\w"), timeout=CHAT_S)
    assert not errors
