"""Bind the port, print the address with its token, and serve until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from rich.console import Console

from lorakit.errors import DependencyError, WorkError

PORT = 8765
ADDRESS = "page     "  # begins the line with the address


def serve_ui(
    folder: Path,
    console: Console,
    host: str = "127.0.0.1",
    port: int | None = None,
    hosts: tuple[str, ...] = (),
    prefix: str = "",
    framed: bool = False,
) -> None:
    """Serve the page of `folder`; closing it or ending this process ends no run.

    Args:
        port: 0 takes any free one; by default 8765, or a free one if that is taken.
        hosts: see `access.Access`, as `prefix` and `framed`.

    Raises:
        DependencyError: starlette or uvicorn is not installed.
        WorkError: the port cannot be bound.
    """
    try:
        import uvicorn

        from lorakit.web.app import create_app
    except ImportError as error:
        raise DependencyError(
            f"lorakit ui: {error.name} is not installed", hint="pip install 'lorakit[ui]'"
        ) from error
    token = secrets.token_urlsafe(24)
    if host not in ("127.0.0.1", "localhost", "::1"):
        console.print(f"note: {host} is reachable from other machines, in plain HTTP")
        hosts = (*hosts, *([] if host in ("0.0.0.0", "::") else [host]))
    app = create_app(folder, token, hosts, prefix, framed)
    listener = _bound(host, port)
    place = f"[{host}]" if ":" in host else host
    # `t`: the console removes values of parameters that are called token.
    path = f"/~{token}/" if framed else f"/?t={token}"
    base = f"http://{place}:{listener.getsockname()[1]}{prefix.rstrip('/')}"
    console.print(f"{ADDRESS}{base}{path}", soft_wrap=True)
    console.print("Ctrl-C ends this page; runs that it started continue")
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run([listener])


def _bound(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in [PORT, 0] if port is None else [port]:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, wanted))
            listener.listen()  # who opens the printed address at once waits, and is not refused
            return listener
        except OSError as error:
            listener.close()
            fault = error
    raise WorkError(
        f"{host}:{port}: {fault.strerror or fault}", hint="choose another with --port, or --port 0"
    ) from fault
