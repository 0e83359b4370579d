"""Serve the page until Ctrl-C, and show it in a notebook: `lorakit ui`, `lorakit.ui()`."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    # Without its own logging, which closes the handlers of other packages in this process.
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", server_header=False, proxy_headers=False,
        ws="none", timeout_graceful_shutdown=2,
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


def ui(folder: str | Path = ".", height: int = 800) -> Any:
    """Show the page of a folder of runs below this cell; runs started there outlive the notebook.

    The server is a process of its own, which ends with the notebook. Outside a notebook the address
    is printed.

    Args:
        folder: folder that contains runs and data.
        height: height of the frame in pixels.

    Returns:
        The frame to display; the address as text outside a notebook; None in Colab.

    Raises:
        WorkError: the server did not start.
    """
    address = start_server(Path(folder))
    if "IPython" not in sys.modules:
        print(address)
        return address
    if "google.colab" in sys.modules:
        from google.colab import output  # type: ignore[import-untyped]

        place = urlsplit(address)
        output.serve_kernel_port_as_iframe(place.port, path=place.path, height=str(height))
        return None
    from IPython.display import IFrame

    return IFrame(frame_address(address), "100%", height)


def start_server(folder: Path) -> str:
    """Start `lorakit ui` for frames; return its address, which holds the token.

    Raises:
        WorkError: it ended instead.
    """
    words = ["ui", str(folder), "--port", "0", "--framed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    line = process.stdout.readline()
    if not line.startswith(ADDRESS):
        process.kill()
        raise WorkError(
            f"lorakit ui did not start: {process.stderr.read().strip()[-500:]}",
            hint="run `lorakit ui` in a terminal to see more",
        )
    atexit.register(process.terminate)
    return line.removeprefix(ADDRESS).strip()


def frame_address(address: str) -> str:
    """Address of the server as the notebook's browser reaches it: on a hub through its proxy."""
    hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    place = urlsplit(address)
    return f"{hub.rstrip('/')}/proxy/{place.port}{place.path}" if hub else address
