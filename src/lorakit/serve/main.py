"""A run, a port and a key enter; a running server leaves only when it is stopped.

vLLM where it is installed beside a CUDA card and can serve the run; else the embedded server.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lorakit.errors import DependencyError, RecipeError, RunError
from lorakit.export.serving import VLLM_RANKS, largest_rank, vllm_command, why_vllm_cannot
from lorakit.export.tuned_run import TunedRun, open_source
from lorakit.storage.run_dir import RunDir

LOOPBACK = ("127.0.0.1", "::1", "localhost")
INSTALL = "pip install 'lorakit[serve]'"


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen, and what opens the door."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None


def serve(runs: Sequence[RunDir], place: Place, engine: str, console: Console) -> None:
    """Serve the first run's adapter, and those of the others on the same base, until stopped.

    Raises:
        RecipeError: unknown engine, or a door open to the network without a key.
        RunError: the port is taken.
        DependencyError: the packages of the chosen engine are not installed.
        ModelError: a run's base is gone, changed or another one.
    """
    if engine not in ("auto", "vllm", "embedded"):
        raise RecipeError(f"--engine {engine}: unknown", hint="engines: auto, vllm, embedded")
    if place.host not in LOOPBACK and not place.api_key:
        raise RecipeError(
            f"--host {place.host} lets other machines in, and there is no key",
            hint="give one with --api-key-file FILE, or stay on 127.0.0.1",
        )
    check_port(place)
    sources = [open_source(run) for run in runs]
    if engine != "embedded":
        reason = why_not_vllm(sources)
        if reason is None:
            _exec_vllm(sources, place, console)
        if engine == "vllm":
            raise DependencyError(f"--engine vllm: {reason}", hint="leave --engine out")
        console.print(f"engine   embedded: {reason}")
    _embedded(runs, place, console)


def why_not_vllm(sources: Sequence[TunedRun]) -> str | None:
    """Why vLLM cannot serve these runs here; None where it can."""
    import torch

    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA card for vLLM"
    return next((reason for s in sources if (reason := why_vllm_cannot(s))), None)


def vllm_line(sources: Sequence[TunedRun], place: Place) -> list[str]:
    """The command that serves all of them; the key goes by the environment, out of sight of ps."""
    line = vllm_command(sources[0], sources[0].run.adapter, merged=False)
    at = line.index("--max-lora-rank")
    line[at:at] = [f"{s.name}={s.run.adapter}" for s in sources[1:]]
    rank = max(largest_rank(s) for s in sources)
    line[line.index("--max-lora-rank") + 1] = str(next(r for r in VLLM_RANKS if r >= rank))
    line += ["--max-loras", str(len(sources))]
    return [*line, "--host", place.host, "--port", str(place.port)]


def check_port(place: Place) -> None:
    """Say that a port is taken before minutes are spent on loading a model.

    Raises:
        RunError: it is, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, place.port))
        except (OSError, OverflowError) as error:
            raise RunError(
                f"--port {place.port}: cannot listen on {place.host}:{place.port}: "
                f"{getattr(error, 'strerror', None) or error}",
                hint="another program has it; choose one with --port, or 0 for any free one",
            ) from error


def read_key(api_key: str | None, file: Path | None) -> str | None:
    """The key itself; a file keeps it out of the shell's history and of `ps`.

    Raises:
        RecipeError: the file cannot be read or is empty, or both were given.
    """
    if file is None:
        return api_key
    if api_key is not None:
        raise RecipeError("--api-key and --api-key-file both give a key", hint="keep one")
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--api-key-file {file}: cannot be read: {error}") from error
    if not key:
        raise RecipeError(f"--api-key-file {file}: is empty", hint="put the key into it")
    return key


def _exec_vllm(sources: Sequence[TunedRun], place: Place, console: Console) -> None:
    line = vllm_line(sources, place)
    console.print(f"engine   vLLM: {shlex.join(line)}", markup=False)
    if place.api_key:
        os.environ["VLLM_API_KEY"] = place.api_key
    os.execvp(line[0], line)


def _embedded(runs: Sequence[RunDir], place: Place, console: Console) -> None:
    try:
        import uvicorn
        from starlette import applications  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"serving needs packages that are not installed: {error}", hint=INSTALL
        ) from error
    from lorakit.model.multi_adapter import MultiAdapterModel
    from lorakit.serve.app import Server

    several = MultiAdapterModel.of(runs[0], tuple(runs[1:]))
    server = Server(several, place.api_key)
    config = uvicorn.Config(
        # On a network the key keeps strangers out, and names of this machine are not known.
        server.app(LOOPBACK if place.host in LOOPBACK else None),
        host=place.host,
        port=place.port,
        log_level="warning",
        # Streams that are under way get this long after Ctrl-C.
        timeout_graceful_shutdown=20,
    )
    listening = config.bind_socket()
    port = listening.getsockname()[1]
    host = f"[{place.host}]" if ":" in place.host else place.host
    console.print(f"models   {', '.join([*several.tuned, several.base_name])}")
    console.print(f"serving  http://{host}:{port}/v1  (Ctrl-C stops)", markup=False)

    class Stoppable(uvicorn.Server):
        """Ends the answers under way at Ctrl-C; left alone, streams are cut with a traceback."""

        def handle_exit(self, sig: int, frame: object) -> None:
            server.worker.cancel_all()
            super().handle_exit(sig, frame)

    try:
        Stoppable(config).run(sockets=[listening])
    finally:
        server.worker.stop()
        console.print("stopped")
