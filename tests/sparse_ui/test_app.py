"""The command that starts the app."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import app
from engine import runs
from engine.runs import Run
from engine.spec import RunSpec

PROJECT = Path(app.__file__).parent


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "app.py", "--no-browser", *arguments]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_says_where_it_is_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    process = _start("--port", "0", "--runs", str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Sparse tuning is at http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_another_address_without_a_password_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--host", "0.0.0.0", "--port", "0"]) == 2
    assert "got '0.0.0.0'. Add --password" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("matches", "sentence"),
    [
        ({"base": 0.0, "tuned": 1.0}, "Demo finished: exact match base 0.00, tuned 1.00 (150 steps, 71 s)."),
        ({"base": None, "tuned": None}, "Demo finished (150 steps, 71 s)."),
    ],
)
def test_demo_result_is_one_sentence(tmp_path: Path, matches: dict[str, float | None], sentence: str) -> None:
    run: Run = runs.create_run(RunSpec(model="demo", dataset="demo/pirate", output=str(tmp_path)))
    runs.write_json(run.path / "report.json", {"exact_match": matches, "steps": 150, "train_seconds": 71.2})
    assert app.demo_sentence(run) == sentence
