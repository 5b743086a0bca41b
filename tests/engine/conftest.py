"""Fixtures of the engine's tests.

Processes may be forked from a server that has loaded the libraries once; each would take five seconds for it.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from engine import workers
from engine.__main__ import main
from engine.tracer import Tracer

# One server in a process of pytest: tests that fork are of one group, `forked`, which goes to one of them as a whole.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["engine.train.worker", "bitsandbytes", "datasets", "peft", "transformers.models.llama.modeling_llama"]
)


@pytest.fixture(scope="session")
def tracer() -> Iterator[Tracer]:
    """A tracer whose process all tests of the group `tracer` share."""
    with Tracer() as asked:
        yield asked


@pytest.fixture
def seeing(tmp_path: Path) -> tuple[Path, Gemma3ForConditionalGeneration]:
    """A tiny Gemma 3 with its vision tower, in a folder as it comes."""
    text = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config={**text, **heads}, vision_config={**vision, **sizes}, image_token_index=159)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing", model


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork what `start_worker` starts: the same command, in a session, log and environment of its own."""

    class Forked:
        """Of `subprocess.Popen` what `start_worker` needs."""

        def __init__(self, command: list[str], *, stdout: IO[bytes], env: Mapping[str, str], **_: Any) -> None:
            words = command[command.index("engine") + 1 :]
            self._process = FORKING.Process(target=_obey, args=(words, stdout.name, dict(env)), daemon=True)
            self._process.start()
            self.pid: int = self._process.pid

        def wait(self) -> None:
            self._process.join()

        def poll(self) -> int | None:
            return None if self._process.is_alive() else 1

    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))


def _obey(words: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(main(words))
