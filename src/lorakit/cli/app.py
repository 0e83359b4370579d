"""Parts shared by all commands: the app, two consoles, common options, and JSON output."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
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
# Settings of a command with keys of the recipe as words, for `recipe_and_overrides`.
KEYS_AS_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


def recipe_and_overrides(
    context: typer.Context, recipe: Path | None, given: Sequence[str] | None
) -> tuple[Path | None, list[str]]:
    """Divide a command's further words into a recipe file and `key=value` overrides.

    Keys of a recipe may be written as `key=value`, `--key value` and `--key=value`, too; a word
    after `--key` is its value unless it begins with `--`, and without one it is true.

    Args:
        recipe: the first word, which need not be a file.
        given: values of `--set`.
    """
    from lorakit.recipe.aliases import SYNONYMS
    from lorakit.recipe.schema import Recipe

    words = [*([str(recipe)] if recipe else []), *context.args]
    files, pairs = [], list(given or [])
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key.partition(".")[0] not in {*Recipe.model_fields, *SYNONYMS}:
                options = [each for option in context.command.params for each in option.opts]
                near = difflib.get_close_matches(f"--{name}", options, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                context.fail(f"No such option: --{name}{hint}")
            if not equals:
                value = "true" if not words or words[0].startswith("--") else words.pop(0)
            pairs.append(f"{key}={value}")
        elif "=" in word and not Path(word).exists():
            pairs.append(word)
        else:
            files.append(word)
    if len(files) > 1:
        context.fail(f"Got unexpected argument {files[1]}, expected key=value")
    return (Path(files[0]) if files else None), pairs


def recipe_flags(
    model: str | None,
    data: Sequence[str] | None,
    method: str | None,
    output: str | None,
    offline: bool,
) -> dict[str, Any]:
    """Settings of the flags that train and sweep share, for `load_recipe`; None means not given."""
    return {
        "model": model,
        "data": data[0] if data and len(data) == 1 else data or None,
        "method": method,
        "output_dir": output,
        "offline": offline or None,
    }


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
    from lorakit.cli.launcher import launch_processes, launched, without_gpus

    if not launched():
        raise typer.Exit(launch_processes(without_gpus(sys.argv[1:]), gpus))


def first_rank() -> bool:
    """Return True on rank 0, read from the environment before the process group exists."""
    from lorakit.distributed.launch_env import launched_rank

    return launched_rank() == 0
