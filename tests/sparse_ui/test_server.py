"""The door of a really launched app."""

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sparse_ui import server
from sparse_ui.context import AppContext, Settings
from sparse_ui.layout import build_app
from sparse_ui.server import Door, first_free_port, launch_arguments

pytestmark = pytest.mark.xdist_group("server")  # what the module shares is made once


def _launch(tmp_path: Path, password: str | None = None) -> tuple[object, str]:
    port = first_free_port("127.0.0.1", 0)
    app = build_app(AppContext(Settings(tmp_path)))
    app.launch(**launch_arguments(Door("127.0.0.1", port, password)))
    return app, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "MAX_UPLOAD", "1mb")
        app, url = _launch(tmp_path_factory.mktemp("runs"))
    yield url
    app.close(verbose=False)  # type: ignore[attr-defined]


def test_own_page_opens_without_footer(address: str) -> None:
    answer = httpx.get(address, timeout=20)
    assert answer.status_code == 200
    assert '"footer_links":[]' in answer.text.replace(" ", "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example"])
def test_foreign_host_is_refused(address: str, host: str) -> None:
    assert httpx.get(address, headers={"Host": host}, timeout=20).status_code == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_foreign_origin_may_change_nothing(address: str, origin: str, path: str) -> None:
    answer = httpx.post(address + path, headers={"Origin": origin}, json={}, timeout=20)
    assert answer.status_code == 403


def test_own_origin_may_upload(address: str) -> None:
    files = {"files": ("rows.jsonl", io.BytesIO(b"{}\n"))}
    answer = httpx.post(f"{address}/gradio_api/upload", headers={"Origin": address}, files=files, timeout=20)
    assert answer.status_code == 200


def test_oversize_upload_is_refused(address: str) -> None:
    files = {"files": ("rows.jsonl", io.BytesIO(b"x" * (2 << 20)))}
    answer = httpx.post(f"{address}/gradio_api/upload", files=files, timeout=20)
    assert answer.status_code == 413


def test_files_outside_the_app_are_not_served(address: str) -> None:
    for path in (Path(server.__file__), Path("/etc/hostname")):
        assert httpx.get(f"{address}/gradio_api/file={path}", timeout=20).status_code in (403, 404)


def test_no_page_describes_the_interface(address: str) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert httpx.get(address + path, timeout=20).status_code == 404
    assert httpx.get(f"{address}/gradio_api/info", timeout=20).json()["named_endpoints"] == {}


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    app, url = _launch(tmp_path, password="right")
    try:
        assert httpx.get(f"{url}/config", timeout=20).status_code == 401
        wrong = httpx.post(f"{url}/login", data={"username": "any", "password": "wrong"}, timeout=20)
        right = httpx.post(f"{url}/login", data={"username": "any", "password": "right"}, timeout=20)
        assert (wrong.status_code, right.status_code) == (400, 200)
    finally:
        app.close(verbose=False)  # type: ignore[attr-defined]


def test_ipv6_loopback_answers_under_its_address(tmp_path: Path) -> None:
    port = first_free_port("::1", 0)
    app = build_app(AppContext(Settings(tmp_path)))
    app.launch(**launch_arguments(Door("::1", port)))
    try:
        assert httpx.get(f"http://[::1]:{port}/", timeout=20).status_code == 200
        assert httpx.get(f"http://[::1]:{port}/", headers={"Host": "evil.example"}, timeout=20).status_code == 400
    finally:
        app.close(verbose=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org"])
def test_another_address_needs_a_password(host: str) -> None:
    with pytest.raises(ValueError, match=host):
        Door(host, 7860)


def test_a_taken_port_yields_the_next() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < first_free_port("127.0.0.1", port) <= port + server.PORTS_TRIED
