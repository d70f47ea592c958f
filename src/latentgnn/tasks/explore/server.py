"""The page over HTTP, with its rules: who may connect, how much may be sent, and what is said about bad files.

The page sends no paths: inputs are requested by index, and a file dropped on the page is sent as bytes, which are
stored in a temporary file, under a name that we choose, while they are read. All state of a view is kept in the
browser, so that several users do not interfere.
"""

import hmac
import secrets
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn import Config, Server

from latentgnn.errors import UserError
from latentgnn.tasks.explore.views import Explorer
from latentgnn.tasks.inputs import noted

MOST_BYTES = 64 * 2**20
"""Maximum size of a file that is dropped on the page."""

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_AT_ONCE = 64  # connections


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be reached from this machine.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org")]
        [True, True, True, False, False]
    """
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"


def application(explorer: Explorer, *, token: str | None = None) -> Starlette:
    """Return the web application: the page and the requests that it makes.

    Args:
        explorer: the model and its inputs.
        token: if given, every request must have it, as ``Authorization: Bearer TOKEN``. Without one, only requests that
            use a name of this machine are answered, so that no other site can send requests under its own name.
    """
    # One input at a time: there is one model, and limited memory.
    lock = threading.Lock()
    page = {
        file.name: (file.read_bytes(), _TYPES[Path(file.name).suffix])
        for file in files("latentgnn.tasks.explore").joinpath("page").iterdir()
    }

    def refusal(request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if token is None and not is_loopback(_name(host)):
            return 403, f"the request uses the host name {host[:80]!r}; without --host, use localhost or 127.0.0.1"
        if origin is not None and origin != f"http://{host}":
            return 403, "the request comes from another site"
        if token is not None and request.url.path.startswith("/api/"):
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return 401, "the token is missing or wrong: open the link that the command has printed"
        return None

    async def guard(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = refusal(request)
        response = _fault(*refused) if refused else await proceed(request)
        response.headers.update(_HEADERS)
        return response

    def static(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in page:
            return _fault(404, "there is no such page")
        return Response(page[name][0], media_type=page[name][1])

    def about(_: Request) -> Response:
        known = {"names": list(explorer.names), "suffixes": list(explorer.suffixes), "most_bytes": MOST_BYTES}
        return JSONResponse({**explorer.about, **known})

    def of_input(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(explorer.names):
            return _fault(404, f"there is no input {number}; there are {len(explorer.names)}")
        return answer(request, lambda: explorer.input(number), Path(explorer.names[number]))

    async def of_upload(request: Request) -> Response:
        suffix = request.query_params.get("suffix", "").lower()
        if suffix not in explorer.suffixes:
            return _fault(415, f"a file that ends in {suffix[:20]!r}; expected {', '.join(explorer.suffixes)}")
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > MOST_BYTES:
                return _fault(
                    413, f"the file is larger than {MOST_BYTES >> 20} MB: shrink it, or name it to the command"
                )

        def use(path: Path) -> Response:
            return answer(request, lambda: explorer.read(path), path)

        return await run_in_threadpool(_from_file, content, suffix, use)

    def answer(request: Request, load: Callable[[], Any], path: Path) -> Response:
        faults: list[str] = []
        content = b""
        with noted(faults, path), lock:
            sample = load()
            if request.url.path.endswith("/view"):
                content = explorer.view(sample)
            else:
                content = explorer.without(sample, request.query_params.get("block"))
        if faults:
            # The page need not know where we have stored an upload.
            return _fault(422, faults[0].replace(str(path), path.name))
        return Response(content, media_type="application/octet-stream")

    return Starlette(
        routes=[
            Route("/", static),
            Route("/page/{name}", static),
            Route("/api/about", about),
            *(Route(f"/api/input/{{number:int}}/{what}", of_input) for what in ("view", "without")),
            *(Route(f"/api/upload/{what}", of_upload, methods=["POST"]) for what in ("view", "without")),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
    )


def _name(host: str) -> str:
    """The name in a request's Host header, without port; empty if it is invalid."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _from_file(content: bytearray, suffix: str, use: Callable[[Path], Response]) -> Response:
    with tempfile.TemporaryDirectory(prefix="latentgnn-") as folder:
        path = Path(folder) / f"your file{suffix}"
        path.write_bytes(content)
        return use(path)


def _fault(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def serve(explorer: Explorer, *, host: str, port: int, say: Callable[[str], None] = print) -> None:
    """Serve the page until the process is interrupted.

    Args:
        explorer: the model and its inputs.
        host: a name or address of this machine; unless it is a loopback address, a token is created, which is part of
            the link.
        port: the port; 0 takes a free one.
        say: called with the link.

    Raises:
        UserError: if the host or port cannot be used.
    """
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error}); name another port, or 0 for a free one"
        ) from None
    with listening:
        say(link(listening.getsockname()[:2], host, token))
        with suppress(KeyboardInterrupt):
            Server(configured(application(explorer, token=token))).run(sockets=[listening])


def configured(app: Starlette) -> Config:
    """Return the server's configuration: quiet, with a limited number of connections."""
    return Config(app, log_level="warning", access_log=False, limit_concurrency=_AT_ONCE, timeout_graceful_shutdown=1)


def link(address: tuple[str, int], host: str, token: str | None) -> str:
    """Return the page's address; the token is after ``#``, so that browsers do not send it.

    Example:
        >>> link(("127.0.0.1", 8765), "127.0.0.1", None), link(("0.0.0.0", 80), "0.0.0.0", "abc")[-10:]
        ('http://127.0.0.1:8765/', '#token=abc')
    """
    name = socket.gethostname() if address[0] in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{address[1]}/{'' if token is None else f'#token={token}'}"
