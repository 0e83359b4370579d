"""What one export is asked to do: the run, the place to write, and the options of the command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lorakit.export.source import Source


@dataclass(frozen=True, slots=True)
class Job:
    """One export. Options that a format does not know are refused before it starts."""

    source: Source
    target: Path
    console: Console
    quantization: str | None = None  # GGUF: F16, Q8_0, Q4_K_M, ...
    onto: str = "trained"  # merged: the base as in training, or "original"
    dtype: str | None = None  # merged: default, the type of training
    as_adapter: bool | None = None  # ollama: base and adapter in two files
    repository: str | None = None  # hub: owner/name
    public: bool = False
    merged: bool = False  # hub: the merged model instead of the adapter
    verify: bool = True
    ends: list[str] = field(default_factory=list)  # said last: what to do with the files
