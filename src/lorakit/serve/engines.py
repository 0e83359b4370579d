"""Command lines of the servers for a set of runs: vLLM, `transformers serve`, llama.cpp's.

vLLM holds several adapters on one base. The other two take a copy of the base for each run.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from lorakit.data.chat_template.render import template_capabilities
from lorakit.errors import DependencyError, ModelError, RecipeError, RunError
from lorakit.export.exporters import export_run
from lorakit.export.gguf import link_weights
from lorakit.export.hf_files import write_config, write_tokenizer
from lorakit.export.serving import tool_parser, vllm_command, why_vllm_cannot
from lorakit.export.tuned_run import TunedRun
from lorakit.storage.run_dir import ADAPTER_WEIGHTS

NEEDS = {
    "vllm": ("vllm",),
    "llama.cpp": ("xllamacpp", "starlette", "uvicorn"),
    "transformers": ("fastapi", "openai", "uvicorn"),
}
CHILD = (sys.executable, "-P", "-m", "lorakit.serve.child")
# Keys of a request that change the answer, or how it is sent: in all three, and in two of them.
KEYS = ["model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"]
KEYS += ["stop", "stream", "stream_options", "logit_bias"]
MORE = ["presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "response_format"]
MORE += ["top_k", "min_p", "ignore_eos"]
TOOLS = ["tools", "tool_choice", "parallel_tool_calls"]
# Values of keys that a request does not set. The servers' own differ: llama.cpp's are temperature
# 0.8, top_p 0.95, top_k 40 and min_p 0.05, vLLM's and transformers' those of the base's author.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}

Models = dict[str, TunedRun]  # by the name that requests use


@dataclass(frozen=True, slots=True)
class Place:
    """Address to listen on, and the key that requests must have."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None

    @property
    def url(self) -> str:
        """Address of the server for this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Start:
    """A command, the request keys that its server reads for each model, and their defaults."""

    command: list[str]
    keys: dict[str, list[str]]
    defaults: dict[str, Any]
    exact: bool = True  # the trained weights, not a quantization of them


def choose_engine(
    models: Models, asked: str, place: Place, folder: Path, console: Console
) -> tuple[str, Start]:
    """Choose the engine and its command; files for it are written to `folder`.

    Raises:
        RecipeError: there is no such engine.
        DependencyError: it is not installed, or cannot serve these runs.
        ModelError: it does not know the model, or the base's files are not on this machine.
        RunError: a GGUF export is older than its adapter.
    """
    engine = choose(models, asked, console)
    try:
        return engine, _start(engine, models, place, folder, console)
    except ModelError as error:
        if asked != "auto" or engine != "llama.cpp":
            raise
        console.print(f"not llama.cpp: {error.message}")
    return "transformers", _start("transformers", models, place, folder, console)


def choose(models: Models, asked: str, console: Console) -> str:
    """Choose the engine: the requested one, else vLLM on a GPU, llama.cpp on a CPU, transformers.

    Raises:
        RecipeError: there is no such engine.
        DependencyError: what was asked for is not installed, or cannot serve these runs.
    """
    if asked not in ("auto", *NEEDS):
        raise RecipeError(f"--engine {asked}: unknown", hint=f"engines: auto, {', '.join(NEEDS)}")
    for engine in NEEDS if asked == "auto" else (asked,):
        reason = why_not(engine, list(models.values()), asked == "auto")
        if reason is None:
            return engine
        console.print(f"not {engine}: {reason}")
    package = "vllm" if asked == "vllm" else "'lorakit[serve]'"
    raise DependencyError(
        f"--engine {asked}: {reason}",
        hint=f"pip install {package}, or export the run (docs/guides/deploy.md)",
    )


def why_not(engine: str, sources: list[TunedRun], auto: bool = False) -> str | None:
    """Reason why an engine cannot serve these runs here or is not the best choice, or None."""
    import torch

    missing = [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]
    cuda = torch.cuda.is_available()
    if missing:
        return f"{missing[0]} is not installed"
    if engine == "llama.cpp":
        exported = all(map(gguf_file, sources))
        return "there is a GPU, and no GGUF export" if auto and cuda and not exported else None
    if engine == "transformers":
        return next((f"{s.name} unties its base's embeddings" for s in sources if s.unties), None)
    if not cuda:
        return "there is no CUDA GPU"
    if len({(s.location, s.tokenizer.chat_template) for s in sources}) > 1:
        return "the runs differ in base or chat template, and it takes one"
    return next((reason for s in sources if (reason := why_vllm_cannot(s))), None)


def _start(engine: str, models: Models, place: Place, folder: Path, console: Console) -> Start:
    where = (place.host, str(place.port))
    if engine == "vllm":
        return _vllm(models, *where)
    if engine == "llama.cpp":
        return _llama_cpp(models, [*CHILD, *where, engine], console)
    return _transformers(models, [*CHILD, *where, engine], folder)


def _vllm(models: Models, host: str, port: str) -> Start:
    """`vllm serve` with every adapter, the guard as its middleware."""
    sources = list(models.values())
    folders = {name: source.run.adapter.resolve() for name, source in models.items()}
    program, *line = vllm_command(folders, *sources)
    line = [str(Path(sys.executable).with_name(program)), *line]
    line += ["--host", host, "--port", port, "--generation-config", "vllm"]
    line += ["--middleware", "lorakit.serve.guard.Guard", "--allowed-origins", "[]"]
    keys = [*KEYS, *MORE, "n", "repetition_penalty", "min_tokens", "stop_token_ids"]
    # The runs have one template.
    keys += TOOLS if tool_parser(sources[0]) and _writes_tools(sources[0]) else []
    # A run may end its answers with another token than its base.
    stops = sorted({token for source in sources for token in source.stops()})
    return Start(line, dict.fromkeys(models, keys), {**DEFAULTS, "stop_token_ids": stops})


def _llama_cpp(models: Models, line: list[str], console: Console) -> Start:
    """llama.cpp with each run's GGUF export, made and compared first if it is missing."""
    files = []
    for name, source in models.items():
        if not (source.run.export / "gguf").exists():
            export_run(source.run, "gguf", None, console)
        file = gguf_file(source)
        trained = (source.run.adapter / ADAPTER_WEIGHTS).stat().st_mtime
        if file is None or file.stat().st_mtime < trained:
            raise RunError(
                f"{source.run.export / 'gguf'}: found no GGUF file newer than the adapter",
                hint="remove this folder and start again",
            )
        files.append(f"{name}={file.resolve()}")
    context = str(max(source.context for source in models.values()))
    exact = all(file.endswith(("F32.gguf", "F16.gguf")) for file in files)
    own = [*KEYS, *MORE, "repeat_penalty"]
    # It gives the schemas to the template, which may write none of them.
    keys = {name: own + (TOOLS if _writes_tools(s) else []) for name, s in models.items()}
    return Start([*line, context, *files], keys, {**DEFAULTS, "top_k": 0, "min_p": 0.0}, exact)


def _writes_tools(source: TunedRun) -> bool:
    return "tool schemas" not in template_capabilities(source.tokenizer).unsupported


def gguf_file(source: TunedRun) -> Path | None:
    """The run's GGUF export, if there is one."""
    return next(iter(sorted((source.run.export / "gguf").glob("*.gguf"))), None)


def _transformers(models: Models, line: list[str], folder: Path) -> Start:
    """`transformers serve` in `folder`, where each run becomes a base with an adapter in it."""
    from transformers.cli.serving.utils import get_response_template

    for name, source in models.items():
        _stage(source, folder / name)
    sources = list(models.values())
    line += ["--dtype", sources[0].device.dtype]
    if len(sources) == 1:
        line.append(next(iter(models)))  # is loaded at the start, and kept
    else:
        line += ["--model-timeout", "-1"]
    if any(s.recipe.method == "qlora" for s in sources):
        line += ["--quantization", "bnb-4bit"]
    # It reads calls out of answers of a few families only.
    configs = [(s.tokenizer, SimpleNamespace(config=s.config)) for s in sources]
    reads_calls = all(get_response_template(*pair) is not None for pair in configs)
    keys = [*KEYS, "tools"] if reads_calls else KEYS
    return Start(line, dict.fromkeys(models, keys), DEFAULTS)


def _stage(source: TunedRun, folder: Path) -> None:
    if source.folder is None:
        raise ModelError(
            f"{source.base_name}: its files are not on this machine",
            hint=f"fetch them: {source.run.command('eval')}",
        )
    folder.mkdir()
    write_config(source, folder, source.device.dtype, tied=source.tied)
    write_tokenizer(source, folder)
    link_weights(source.folder, folder)
    link_weights(source.run.adapter, folder)
    (folder / "adapter_config.json").write_text(json.dumps(source.adapter), encoding="utf-8")
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if key.endswith("_token_id")}
    # Without do_sample a temperature has no effect; without top_k it would be 50.
    path.write_text(json.dumps({**values, "do_sample": True, "top_k": 0}), encoding="utf-8")
