"""Paths of the files of a run, and functions to write and read them.

    runs/<name>/ recipe.yaml · data_report.json · plan.json · environment.json · base.json
                 data_rows.npy · start.json · metrics.jsonl · rollouts.jsonl
                 checkpoints/step_000100/ · best.json
                 stopped.json · adapter/ · eval.json · export/<format>/ · export/verify.json
                 report.html

This layout is the contract between commands: eval, chat and export need this folder only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import RunError
from lorakit.redact import redacted
from lorakit.storage.atomic_dir import flush, write_error

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_STEP = re.compile(r"^step_(\d{6,})$")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run. Creating the object does not access the disk."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def data_report(self) -> Path:
        return self.path / "data_report.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Completions of logged steps with their rewards, of a run with `objective: grpo`."""
        return self.path / "rollouts.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def validation(self) -> Path:
        """Held-out conversations of this run, so that `eval` needs no other file."""
        return self.path / "validation.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    @property
    def answers(self) -> Path:
        """Answers of base and tuned to tasks, so that an evaluation continues."""
        return self.path / "evaluation"

    @property
    def base(self) -> Path:
        """Sizes and hashes of the base model's weights, to detect later changes."""
        return self.path / "base.json"

    @property
    def start(self) -> Path:
        """Record of the adapter that training started from."""
        return self.path / "start.json"

    @property
    def best(self) -> Path:
        """The step with the lowest held-out loss, of a run that compared steps."""
        return self.path / "best.json"

    @property
    def stopped(self) -> Path:
        """The reason why a sweep stopped this run before its last step."""
        return self.path / "stopped.json"

    @property
    def rows(self) -> Path:
        """Content hash of each training example's row, to name changed rows."""
        return self.path / "data_rows.npy"

    @property
    def reference(self) -> Path:
        """Log-probabilities of preference data under the reference model."""
        return self.path / "reference.safetensors"

    @property
    def report(self) -> Path:
        """HTML report of this run, made from its other files."""
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step_{step:06d}"

    def list_checkpoints(self) -> list[Path]:
        """List finished checkpoints, oldest first; incomplete ones have another name."""
        if not self.checkpoints.is_dir():
            return []
        folders = [p for p in self.checkpoints.iterdir() if p.is_dir() and _STEP.match(p.name)]
        return sorted(folders, key=lambda p: int(p.name.split("_")[1]))

    def command(self, verb: str, *options: str, program: str = "lorakit") -> str:
        """Format a command line for this run that works when it is pasted into a shell."""
        return shlex.join([program, verb, pasted(self.path), *options])

    def going_on(self, gpus: int = 1, program: str = "lorakit") -> str:
        """Format the command line that resumes this run."""
        more = [] if gpus == 1 else ["--gpus", str(gpus)]
        return shlex.join([program, "train", pasted(self.recipe), "--resume", *more])

    def has_run(self) -> bool:
        """True if the folder belongs to a run: it contains a recipe."""
        return self.recipe.exists()

    def holds_work(self) -> bool:
        """True if starting over would lose a checkpoint or an adapter."""
        return bool(self.list_checkpoints()) or self.has_adapter()

    def has_adapter(self) -> bool:
        """True if training has saved its adapter."""
        return (self.adapter / ADAPTER_WEIGHTS).exists()


def pasted(path: str | Path) -> str:
    """Path as an argument that no program takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def find_run(path: str | Path, trained: bool = True) -> RunDir:
    """Open the run directory at `path` for eval, chat or export.

    Args:
        trained: require an adapter.

    Raises:
        RunError: the folder is missing, is not a run, or has no adapter yet.
    """
    run = RunDir(Path(path))
    if not run.path.is_dir():
        raise RunError(
            f"{path}: no such run directory",
            hint="give the folder that `lorakit train` printed, such as runs/demo-lora",
        )
    if not run.has_run():
        names = ", ".join(sorted(p.name for p in run.path.iterdir())[:8]) or "nothing"
        raise RunError(
            f"{path}: not a lorakit run (no recipe.yaml in it; found: {names})",
            hint="give the folder that `lorakit train` printed",
        )
    if trained and not run.has_adapter():
        raise RunError(
            f"{path}: this run has no adapter yet (adapter/{ADAPTER_WEIGHTS} is missing)",
            hint=f"finish it with: {run.going_on()}",
        )
    return run


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically: `path` is either the old file or the complete new one.

    Raises:
        WorkError: the disk is full or the folder cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write `text` without secrets to a temporary file, flush it and rename it to `path`.

    Raises:
        WorkError: the disk is full or the folder cannot be written.
    """
    write_bytes(path, redacted(text).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, flush it and rename it to `path`.

    Raises:
        WorkError: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
        flush(path.parent)
    except OSError as error:
        raise write_error(path, error, len(content)) from error


def folder_size(path: Path) -> int:
    """Bytes of all files below `path`, without links."""
    total, pending = 0, [path]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif not entry.is_symlink():
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def append_metrics(run: RunDir, rows: Sequence[dict[str, Any]]) -> None:
    """Append lines to metrics.jsonl, all of them or none.

    Raises:
        OSError: the file cannot be written; its content is unchanged.
    """
    append_lines(run.metrics, rows)


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines to a file, all of them or none.

    Raises:
        OSError: the file cannot be written; its content is unchanged.
    """
    lines = redacted("".join(json.dumps(row) + "\n" for row in rows)).encode()
    with path.open("ab", buffering=0) as handle:
        before = handle.tell()
        try:
            while lines:
                lines = lines[handle.write(lines) :]
        except OSError:
            handle.truncate(before)
            raise


def read_metrics(run: RunDir, held_out: bool = False) -> list[dict[str, Any]]:
    """Read the complete lines of metrics.jsonl, in order; a torn last line is skipped.

    Args:
        held_out: read the evaluations instead of the steps.
    """
    if not run.metrics.exists():
        return []
    return [row for row in read_lines(run.metrics) if ("eval_loss" in row) == held_out]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file of JSON objects; a torn last line is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]
