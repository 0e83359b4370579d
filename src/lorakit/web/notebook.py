"""`lorakit.ui()`: the page in the output of a notebook's cell, in Jupyter and Colab."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorakit.errors import WorkError
from lorakit.web.server import ADDRESS


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
