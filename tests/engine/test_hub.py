import os
import socket
import time
from collections.abc import Iterator

import pytest

from engine.errors import HubUnreachableError
from engine.hub import TIMEOUT_S, hub_online, require_hub

NAMES = ("SPARSE_TUNING_HUB", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.fixture(autouse=True)
def _fresh_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name in NAMES:
        os.environ.pop(name, None)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A server that takes connections and never answers: the worst kind of network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_hub_that_never_answers_is_given_three_seconds_once(silent_hub: socket.socket) -> None:
    begun = time.monotonic()
    assert not hub_online()
    first_s = time.monotonic() - begun
    assert not hub_online()
    assert TIMEOUT_S == 3
    assert first_s < TIMEOUT_S + 1
    assert time.monotonic() - begun - first_s < 0.1
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError, match=r"did not answer within 3 s, and model 'a/b' is not on"):
        require_hub("model 'a/b'")


def test_offline_by_wish_is_not_asked(monkeypatch: pytest.MonkeyPatch, silent_hub: socket.socket) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begun = time.monotonic()
    assert not hub_online()
    assert time.monotonic() - begun < 0.5
