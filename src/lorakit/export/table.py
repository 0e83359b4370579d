"""A format's name enters; that exporter runs on the run directory; a JSON-ready result leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.data.items import read_validation
from lorakit.errors import RecipeError
from lorakit.export.merge import NOTABLE_ROUNDING, export_merged
from lorakit.recipe_file import suggest
from lorakit.records import Conversation
from lorakit.run_dir import RunDir

Exporter = Callable[[RunDir, Path, Console], dict[str, Any]]


def export_run(run: RunDir, to: str, output: Path | None, console: Console) -> dict[str, Any]:
    """Run one exporter into `output` (default: the run's `export/<format>`).

    Raises:
        RecipeError: no such format.
    """
    if to not in EXPORTERS:
        raise RecipeError(
            f"--to {to}: unknown format{suggest(to, EXPORTERS)}",
            hint=f"formats: {', '.join(EXPORTERS)}",
        )
    target = output or run.export / to
    result = EXPORTERS[to](run, target, console)
    return {"format": to, "path": str(target), **result}


def _merged(run: RunDir, target: Path, console: Console) -> dict[str, Any]:
    console.print("merging in float32, then comparing the written files with the adapter")
    records = read_validation(run.validation)
    check = export_merged(run, target, [r for r in records if isinstance(r, Conversation)])
    console.print(
        f"{target}: {check.dtype}; over {check.positions} positions "
        f"KL {check.kl_per_token:.2e} nats per token "
        f"({check.sum_kl_per_token:.1e} before rounding), same top token {check.top1_agreement:.1%}"
    )
    if check.kl_per_token > NOTABLE_ROUNDING:
        console.print(
            f"hint: {check.dtype} rounds much of this adapter away: train with "
            "--set dtype=float32, or use the adapter itself"
        )
    console.print(f"load it with: AutoModelForCausalLM.from_pretrained({str(target)!r})")
    return asdict(check)


EXPORTERS: dict[str, Exporter] = {"merged": _merged}
