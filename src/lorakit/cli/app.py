"""Parts shared by all commands: the app, two consoles, common options, and JSON output."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.console import plain_console

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = plain_console(stderr=True, soft_wrap=True)
out = plain_console()

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/demo-lora.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Offline = Annotated[bool, typer.Option("--offline", help="Do not use the network.")]
Method = Annotated[str | None, typer.Option(help="lora or qlora.")]
Output = Annotated[Path | None, typer.Option(help="Folder to write into.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs of this machine that share each step.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")]


def _show_version(requested: bool) -> None:
    if requested:
        out.print(f"lorakit {importlib.metadata.version('lorakit')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune open chat models with LoRA and QLoRA."""


def print_json(value: Any) -> None:
    """Write one JSON object to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def on_gpus(gpus: int) -> None:
    """Run this command in `gpus` processes and exit with their code; return in such a process."""
    from lorakit.distributed.launcher import launch_processes, launched, without_gpus

    if not launched():
        raise typer.Exit(launch_processes(without_gpus(sys.argv[1:]), gpus))


def first_rank() -> bool:
    """Return True on rank 0, read from the environment before the process group exists."""
    from lorakit.distributed.launch_env import launched_rank

    return launched_rank() == 0
