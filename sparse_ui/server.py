"""Who may talk to the app: this computer under its own name, or, on another address, who has the password."""

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sparse_ui.theme import HEAD, STYLESHEET, build_theme

MAX_UPLOAD = "512mb"
PORTS_TRIED = 100
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True)
class Door:
    """Where the app listens and who may come in. `password` is needed for any address but loopback."""

    host: str
    port: int
    password: str | None = None

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.password:
            raise ValueError(
                f"--host must be this computer (127.0.0.1) where there is no password, got {self.host!r}. "
                "Add --password, or leave --host out and reach the app through an SSH tunnel."
            )


def is_loopback(host: str) -> bool:
    """Return whether an address reaches this computer only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def first_free_port(host: str, wanted: int) -> int:
    """Return `wanted`, or the next port that is free; 0 asks for any.

    Raises:
        OSError: none of the next `PORTS_TRIED` ports is free, or the address is not this computer's.
    """
    for port in [0] if wanted == 0 else range(wanted, min(wanted + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if wanted == 0 or port == min(wanted + PORTS_TRIED, 65536) - 1:
                    raise OSError(f"no free port from {wanted} on {host}: {error.strerror}") from None
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port from {wanted} on {host}")


class SameOriginMiddleware:
    """Answers 403 to a request that would change something and comes from a page of another origin.

    Browsers send `Origin` with every such request and with every WebSocket; programs that send none may pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "websocket" or (scope["type"] == "http" and scope["method"] not in _SAFE_METHODS):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                await _refuse(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    response = PlainTextResponse("This request came from a page of another origin.", status_code=403)
    await response(scope, receive, send)


def allowed_hosts(door: Door) -> list[str]:
    """Return the names under which the app answers; a page that rebinds a foreign name to us gets 400.

    On an address that stands for all interfaces any name may be right, and the password guards.
    """
    if door.host in ("0.0.0.0", "::"):
        return ["*"]
    names = ["127.0.0.1", "localhost", "[::1]", "::1"]
    return names if is_loopback(door.host) else [door.host, f"[{door.host}]", *names]


def launch_arguments(door: Door) -> dict[str, Any]:
    """Return the arguments of `Blocks.launch`: nothing shared, nothing measured, no folder served but Gradio's own."""
    password = door.password

    def may_enter(_user: str, given: str) -> bool:
        return password is not None and hmac.compare_digest(given.encode(), password.encode())

    return {
        "server_name": f"[{door.host}]" if ":" in door.host else door.host,
        "server_port": door.port,
        "auth": may_enter if password else None,
        "auth_message": "Any name, and the password the app was started with." if password else None,
        "share": False,
        "inbrowser": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "show_error": False,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "strict_cors": True,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [],
        "theme": build_theme(),
        "css_paths": [STYLESHEET],
        "head": HEAD,
        "app_kwargs": {"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": _middleware(door)},
    }


def _middleware(door: Door) -> list[Middleware]:
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(door), www_redirect=False),
        Middleware(SameOriginMiddleware),
    ]
