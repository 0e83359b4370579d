"""Web page of a folder of runs: `lorakit ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import app, out


@app.command()
def ui(
    folder: Annotated[
        Path, typer.Argument(help="Folder that contains runs (or runs/) and data.")
    ] = Path(),
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Default 8765, or any free one; 0: any free one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Also answer to this host name, a proxy's; `.name` with all below it."),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Path that a proxy puts in front and does not remove.")
    ] = "",
    framed: Annotated[
        bool, typer.Option("--framed", help="Allow frames: the token is in the path.")
    ] = False,
) -> None:
    """Open a web page: see data, start, watch and compare runs, chat. For this machine alone."""
    from lorakit.errors import RunError
    from lorakit.web.server import serve_ui

    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder", hint="give the folder that contains runs")
    serve_ui(folder, out, host, port, tuple(allow_host or ()), prefix, framed)
