"""The `vllm` and `llama.cpp` formats: a folder for the engine and the command to serve it.

vLLM 0.32, as tested (docs/guides/deploy.md), serves rsLoRA and patterns, but not DoRA, biases,
`modules_to_save` and adapters that change their base: those are merged, and the reason is printed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.export.adapter import EXPERTS_IN_PEFT, beyond_updates, export_adapter
from lorakit.export.gguf import llama_server, write_gguf
from lorakit.export.merged import export_merged
from lorakit.export.tuned_run import Job, TunedRun
from lorakit.storage.run_dir import write_text

# Values that vLLM's --max-lora-rank accepts.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
COMMANDS = "COMMANDS.md"
# What a template writes around a call, and vLLM's parser of that form.
TOOL_PARSERS = {"[TOOL_CALLS]": "mistral", "<function=": "qwen3_coder", "<tool_call>": "hermes"}
TOOL_PARSERS |= {"<|python_tag|>": "llama3_json"}


def why_vllm_cannot(source: TunedRun) -> str | None:
    """Reason why vLLM cannot serve this adapter unmerged, or None."""
    reason = beyond_updates(source)
    if reason:
        return reason
    if source.adapter.get("target_parameters"):
        return EXPERTS_IN_PEFT
    if source.recipe.method == "qlora":
        return "a QLoRA adapter fits the dequantized 4-bit base, which is not the one on the hub"
    if largest_rank(source) > VLLM_RANKS[-1]:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}"
    return None


def largest_rank(source: TunedRun) -> int:
    """Largest rank of the adapter, which the engine has to allow."""
    patterns = source.adapter.get("rank_pattern") or {}
    return int(max(source.adapter["r"], *patterns.values(), 1))


def vllm_command(folders: Mapping[str, Path], *sources: TunedRun) -> list[str]:
    """The `vllm serve` line for adapters of one base, by the names that requests use."""
    first, rank = sources[0], max(map(largest_rank, sources))
    line = ["vllm", "serve", first.location, "--dtype", first.device.dtype, "--enable-lora"]
    line += ["--lora-modules", *[_module(name, folder) for name, folder in folders.items()]]
    line += ["--max-lora-rank", str(next(r for r in VLLM_RANKS if r >= rank))]
    if len(sources) > 1:
        line += ["--max-loras", str(len(sources))]
    line += ["--chat-template", str(next(iter(folders.values())) / "chat_template.jinja")]
    return [*line, *_common(*sources)]


def _module(name: str, folder: Path) -> str:
    """`name=path`, or JSON if the text has an equals sign or a comma."""
    plain = not set(f"{name}{folder}") & set("=,")
    return f"{name}={folder}" if plain else json.dumps({"name": name, "path": str(folder)})


def _common(*sources: TunedRun) -> list[str]:
    line = ["--max-model-len", str(max(source.context for source in sources))]
    parser = tool_parser(sources[0])
    return [*line, "--enable-auto-tool-choice", "--tool-call-parser", parser] if parser else line


def tool_parser(source: TunedRun) -> str | None:
    """vLLM's name for the form in which the run's template writes calls; None for another form."""
    text = str(source.tokenizer.chat_template)
    return next((name for mark, name in TOOL_PARSERS.items() if mark in text), None)


def export_vllm(job: Job) -> dict[str, Any]:
    """Write the adapter if vLLM can serve it, else the merged model, and the command."""
    reason = why_vllm_cannot(job.source)
    merged = job.merged or reason is not None
    if reason and not job.merged:
        job.console.print(f"merging instead of an adapter: {reason}")
    facts = export_merged(job) if merged else export_adapter(job)
    commands = _vllm_lines(job.source, job.target, merged)
    _write_lines(job, commands)
    return {**facts, "merged": merged, "reason": reason, "command": shlex.join(commands["vLLM"])}


def export_llama_cpp(job: Job) -> dict[str, Any]:
    """Write a GGUF file and the `llama-server` command."""
    facts = write_gguf(job)
    line = llama_server(job.source, job.target / facts["file"])
    _write_lines(job, {"llama-server": [*line, "--host", "127.0.0.1", "--port", "8080"]})
    return {**facts, "command": shlex.join(line)}


def _vllm_lines(source: TunedRun, folder: Path, merged: bool) -> dict[str, list[str]]:
    if not merged:
        return {"vLLM": vllm_command({source.name: folder}, source)}
    line = ["vllm", "serve", str(folder), "--served-model-name", source.name]
    lines = {"vLLM": [*line, *_common(source)]}
    lines["SGLang"] = ["python", "-m", "sglang.launch_server", "--model-path", str(folder)]
    return lines


def _write_lines(job: Job, commands: dict[str, list[str]]) -> None:
    """Add the commands to the next steps, and write them without local paths to the folder."""
    text = f"# How to serve {job.source.name}\n"
    for name, line in commands.items():
        job.next_steps.append(f"{name}: {shlex.join(line)}")
        relative = shlex.join(line).replace(str(job.target), ".")
        relative = relative.replace(job.source.location, job.source.base_name)
        text += f"\n{name}, run in this folder:\n\n    {relative}\n"
    write_text(job.target / COMMANDS, text)
