"""Table of export formats, and the function that runs one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.errors import RecipeError, RunError
from lorakit.export.adapter import export_adapter
from lorakit.export.gguf import export_gguf, export_gguf_adapter, quantization
from lorakit.export.merged import export_merged
from lorakit.export.ollama import export_ollama
from lorakit.export.push_to_hub import export_hub
from lorakit.export.serving import export_llama_cpp, export_vllm
from lorakit.export.tuned_run import Job, open_source, require_original
from lorakit.export.verify_outputs import record, show
from lorakit.recipe.loader import suggest
from lorakit.report.page import renew_report
from lorakit.storage.atomic_dir import megabytes
from lorakit.storage.best_record import best_step
from lorakit.storage.run_dir import RunDir, folder_size


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """One export format: its function, and the options of the command that it uses."""

    export: Callable[[Job], dict[str, Any]]
    options: frozenset[str]


def _format(export: Callable[[Job], dict[str, Any]], *options: str) -> ExportFormat:
    return ExportFormat(export, frozenset({"verify", *options}))


EXPORTERS: dict[str, ExportFormat] = {
    "adapter": _format(export_adapter),
    "merged": _format(export_merged, "merge_base", "dtype"),
    "gguf": _format(export_gguf, "quant", "merge_base", "dtype"),
    "gguf-adapter": _format(export_gguf_adapter),
    "ollama": _format(export_ollama, "quant", "merge_base", "dtype", "adapter"),
    "vllm": _format(export_vllm, "merge_base", "dtype", "merged"),
    "llama.cpp": _format(export_llama_cpp, "quant", "merge_base", "dtype"),
    "hub": _format(export_hub, "merge_base", "dtype", "repo", "public", "merged"),
}
# Options of a job that the command did not set.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Job) if f.default is not MISSING}


def export_run(
    run: RunDir, to: str, output: Path | None, console: Console, **options: Any
) -> dict[str, Any]:
    """Run one exporter into `output` (default: the run's `export/<format>`).

    Args:
        options: fields of `Job`.

    Raises:
        RecipeError: unknown format, or an option that it does not use.
        ModelError: `merge_base="original"` for a base without a 16-bit original.
        RunError: `output` already exists.
    """
    if to not in EXPORTERS:
        raise RecipeError(
            f"--to {to}: unknown format{suggest(to, EXPORTERS)}",
            hint=f"formats: {', '.join(EXPORTERS)}",
        )
    _check_options(to, options)
    target = output or run.export / _folder(to, options)
    if target.exists():
        raise RunError(f"{target}: exists already", hint="remove it, or give another --output")
    began = time.monotonic()
    source = open_source(run)
    if options.get("merge_base") == "original":
        require_original(source)
    job = Job(source, target, console, **options)
    if best := best_step(run):
        console.print(f"best     {best.describe()}")
    facts = EXPORTERS[to].export(job)
    facts |= {"step": best.step if best.used else best.steps} if best else {}
    # A folder elsewhere may have the name of another format; its path is not recorded.
    name = target.name if target.parent == run.export else f"{to}, elsewhere: {target.name}"
    record(run, name, {"format": to, **facts})
    renew_report(run, console.print)
    show({target.name: facts, **_inner(target.name, facts)}, console)
    seconds = time.monotonic() - began
    console.print(f"wrote    {target}, {megabytes(folder_size(target))}, in {seconds:,.0f} s")
    for line in job.next_steps:  # not wrapped, since commands are copied
        console.print(line, soft_wrap=True)
    return {"format": to, "path": str(target), **facts}


def _check_options(to: str, options: dict[str, Any]) -> None:
    for key, value in options.items():
        if key not in DEFAULTS:
            raise RecipeError(
                f"{key}: no such option of an export{suggest(key, DEFAULTS)}",
                hint=f"options: {', '.join(sorted(EXPORTERS[to].options))}",
            )
        if value != DEFAULTS[key] and key not in EXPORTERS[to].options:
            having = [name for name, row in EXPORTERS.items() if key in row.options]
            raise RecipeError(
                f"--{key.replace('_', '-')} does not apply to --to {to}",
                hint=f"use it with: {', '.join(having)}",
            )
    if options.get("merge_base", "quantized") not in ("quantized", "original"):
        raise RecipeError(
            f"--merge-base {options['merge_base']}: unknown base",
            hint="bases: quantized (default), original",
        )
    if options.get("dtype") not in (None, "float32", "bfloat16", "float16"):
        raise RecipeError(
            f"--dtype {options['dtype']}: unknown", hint="types: float32, bfloat16, float16"
        )
    if "quant" in EXPORTERS[to].options:
        quantization(options.get("quant"))


def _folder(to: str, options: dict[str, Any]) -> str:
    """Folder name of a format with these options."""
    quant = options.get("quant")
    parts = [to, quantization(quant) if quant else "", options.get("dtype") or ""]
    parts += ["original"] if options.get("merge_base") == "original" else []
    return "-".join(p for p in parts if p)


def _inner(name: str, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows for nested results, such as the merged model behind a GGUF file."""
    return {f"{name}: {k}": v for k, v in facts.items() if isinstance(v, dict)}
