"""The folder that a page shows: its runs with their state, and the paths that may be used in it.

A run is summarized from a few small files, in about a millisecond, and again only after one of them
changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from lorakit.dependencies import installed_version
from lorakit.errors import DataError, LorakitError, RunError
from lorakit.recipe.loader import read_resolved
from lorakit.redact import visible
from lorakit.report.load_run import finite, held_out_loss
from lorakit.storage.run_dir import RunDir, folder_size, read_json
from lorakit.storage.run_lock import LOCK, lock_owner
from lorakit.web.curves import Metrics

OWN = ".lorakit-ui"  # recipes and logs of runs that were started from a page
RUNS_HOME = "runs"
# Each of these files marks a folder as a run; recipe.yaml alone may be a project's.
RUN_FILES = ("environment.json", "metrics.jsonl", "data_report.json", LOCK)
MOST_RUNS, MOST_FOLDERS = 2000, 5000
TAIL_BYTES = 2**13
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.%\[\]:-]*)*")
_PATTERN = re.compile(r"[*?\[]")
_version = cache(installed_version)
PACKAGED = ("demo", "demo:heldout")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Summary:
    """One run as a row of the list; `fault` is a sentence with the remedy."""

    name: str
    path: Path
    status: str  # running, finished, stopped, damaged
    fault: str = ""
    model: str = ""
    method: str = ""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    held_out: float | None = None
    speed: float | None = None
    seconds: float | None = None
    size: int = 0
    changed: float = 0.0

    @property
    def share(self) -> float:
        """Part of the steps that are done."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def left(self) -> float | None:
        """Seconds until the last step, from the duration of the last one."""
        if self.seconds is None or self.steps is None or self.status != "running":
            return None
        return max(0, self.steps - self.step) * self.seconds


@dataclass
class Workspace:
    """A folder with runs in it, in `runs/`, or one level below."""

    root: Path
    _known: dict[Path, tuple[Any, Summary]] = field(default_factory=dict)
    _metrics: dict[Path, Metrics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        if RunDir(self.root).environment.exists():
            raise RunError(
                f"{self.root}: is one run, expected the folder that contains runs",
                hint=f"open its parent: lorakit ui {self.root.parent}",
            )

    @property
    def home(self) -> Path:
        """Folder for new runs: `runs/`, or the folder itself if its runs are there."""
        if self.root.name == RUNS_HOME or (
            not (self.root / RUNS_HOME).is_dir()
            and any(_is_run(folder) for folder in _folders(self.root))
        ):
            return self.root
        return self.root / RUNS_HOME

    def folders(self) -> dict[str, Path]:
        """Folders of all runs by name, which is their path below the root."""
        found: dict[str, Path] = {}
        starts = dict.fromkeys([self.root, self.root / RUNS_HOME])
        for first in (folder for start in starts for folder in _folders(start)):
            inner = [first] if _is_run(first) else [f for f in _folders(first) if _is_run(f)]
            for folder in inner:
                if len(found) < MOST_RUNS and self.contains(folder):
                    found[folder.relative_to(self.root).as_posix()] = folder
        return found

    def contains(self, path: Path) -> bool:
        """True if `path`, with links resolved, is below the root."""
        with suppress(OSError, ValueError, RuntimeError):
            return f"{os.path.realpath(path)}/".startswith(f"{self.root}/".replace("//", "/"))
        return False

    def find(self, name: str) -> RunDir:
        """Open a run by its name in the list.

        Raises:
            RunError: there is no run of this name.
        """
        path = self.folders().get(name)
        if path is None:
            raise RunError(
                f"{name[:200]!a}: no such run in {self.root}", hint="choose one in the list of runs"
            )
        return RunDir(path)

    def summary(self, name: str, path: Path) -> Summary:
        """Summary of one run, read again if one of its files changed."""
        process = lock_owner(path)
        stamp = (process, *_stamps(path))
        known = self._known.get(path)
        if known and known[0] == stamp:
            return known[1]
        made = _summarize(name, RunDir(path), process)
        self._known[path] = (stamp, made)
        return made

    def metrics(self, run: RunDir) -> Metrics:
        """Curves of a run, kept for the last 50 that were asked for."""
        found = self._metrics.pop(run.path, None) or Metrics(run.metrics)
        self._metrics[run.path] = found
        while len(self._metrics) > 50:
            self._metrics.pop(next(iter(self._metrics)))
        if self.contains(run.metrics):
            found.update()
        return found

    def check_source(self, text: str, key: str) -> None:
        """Refuse a local path outside the root; hub ids, https and packaged data pass.

        Raises:
            DataError: the path is outside the root, or does not exist in it.
        """
        if text in PACKAGED or re.match(r"(https|s3|gs)://", text):
            return
        matches: list[Path] = []
        with suppress(OSError, ValueError):
            matches = [self.root / text] if text and (self.root / text).exists() else []
        if not matches and _PATTERN.search(text) and ".." not in text and not text.startswith("/"):
            with suppress(ValueError, OSError):
                matches = list(self.root.glob(text))
        if any(not self.contains(path) for path in matches):
            raise DataError(
                f"{key}: {text}: outside of {self.root}, which this page is confined to",
                hint="copy it into that folder, or start `lorakit ui` in a folder that contains it",
            )
        if not matches and not _HUB_NAME.fullmatch(text):
            raise DataError(
                f"{key}: {text}: not found in {self.root}",
                hint="give a path in that folder, a hub id such as user/name, or `demo`",
            )

    def stamp(self, source: str) -> str:
        """Sizes and times of the local files of a source: prepared data of changed files is old."""
        paths = [self.root / source]
        if _PATTERN.search(source) and not source.startswith("/"):
            with suppress(ValueError, OSError):
                paths += sorted(self.root.glob(source))[:1000]
        if paths[0].is_dir():
            paths += sorted(paths[0].iterdir())[:1000]
        found = []
        for path in paths:
            with suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size))
        return str(found)

    def data_files(self) -> list[str]:
        """Data files at the root and one level below, for the form's suggestions."""
        found = []
        for folder in [self.root, *(f for f in _folders(self.root) if not _is_run(f))]:
            with suppress(OSError), os.scandir(folder) as entries:
                found += [
                    Path(entry.path).relative_to(self.root).as_posix()
                    for entry in entries
                    if entry.name.endswith(DATA_SUFFIXES) and entry.is_file()
                ]
        return sorted(found)[:200]

    def local_models(self) -> list[str]:
        """Model folders at the root and one level below."""
        inner = [f for f in _folders(self.root) if not _is_run(f)]
        found = [f for first in inner for f in [first, *_folders(first)]]
        return [
            folder.relative_to(self.root).as_posix()
            for folder in found
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
        ]


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run; an empty one if the file is missing or damaged."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def damaged_files(run: RunDir) -> list[str]:
    """Names of JSON files of a run that exist and hold no JSON object."""
    paths = (run.plan, run.environment, run.data_report, run.eval, run.export / "verify.json")
    return [p.relative_to(run.path).as_posix() for p in paths if p.exists() and not read_facts(p)]


def version_fault(run: RunDir) -> str:
    """Sentence for a run of a newer version of lorakit; an empty text for others."""
    versions = read_facts(run.environment).get("versions")
    written = str(versions.get("lorakit") or "") if isinstance(versions, dict) else ""
    here = _version("lorakit") or "0"
    with suppress(InvalidVersion):
        if written and Version(written) > Version(here):
            return (
                f"Written by lorakit {visible(written)}, newer than this {here}: "
                "pip install -U lorakit reads it completely."
            )
    return ""


def sentence(error: LorakitError) -> str:
    """One sentence of an error and its hint, for a page."""
    first = " ".join(error.message.split())
    return f"{first}: {error.hint}." if error.hint else f"{first}."


def _summarize(name: str, run: RunDir, process: int | None) -> Summary:
    """Summary of a run from its small files; each of them may be missing or damaged."""
    fault, recipe, steps = version_fault(run), None, None
    status = "running" if process else "finished" if run.has_adapter() else "stopped"
    try:
        recipe = read_resolved(run.recipe).recipe
    except LorakitError as error:
        status = status if process else "damaged"
        found = f"Damaged: {sentence(error)}"
        if not run.recipe.exists():
            found = "No recipe.yaml: the run ended before its first step, or lost the file."
        fault = fault or ("" if process and not run.recipe.exists() else found)
    if not fault and (damaged := damaged_files(run)):
        fault = f"Damaged: {', '.join(damaged)}; remove the file, the page works without it."
    last, held = _tail(run.metrics)
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        examples = read_facts(run.data_report)["examples_train"]
        steps = recipe.total_steps(examples) if recipe else None
    with suppress(OSError):
        return Summary(
            name=name,
            path=run.path,
            status=status,
            fault=fault,
            model=recipe.model[:200] if recipe else "",
            method=recipe.method if recipe else "",
            step=int(last.get("step") or 0),
            steps=steps,
            loss=finite(last.get("loss")),
            held_out=held_out_loss(read_facts(run.eval), held),
            speed=finite(last.get("tokens_per_second")),
            seconds=finite(last.get("seconds")),
            size=folder_size(run.path),
            changed=(run.metrics if run.metrics.exists() else run.path).stat().st_mtime,
        )
    return Summary(name, run.path, "damaged", "The folder is gone: reload the list.")


def _tail(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Last row of a step, and the held-out rows, in the last lines of metrics.jsonl."""
    last: dict[str, Any] = {}
    held: list[dict[str, Any]] = []
    with suppress(OSError), path.open("rb") as handle:
        handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL_BYTES))
        for line in handle.read().splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int:
                    if "eval_loss" in row:
                        held.append(row)
                    else:
                        last = row
    return last, held


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def _folders(folder: Path) -> Iterator[Path]:
    """Visible folders in `folder`, in a bounded number."""
    with suppress(OSError), os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= MOST_FOLDERS:
                return
            with suppress(OSError):
                if not entry.name.startswith(".") and entry.is_dir():
                    yield Path(entry.path)


def _stamps(path: Path) -> tuple[int, ...]:
    """Times of change of the files and folders that a summary depends on."""
    names = ("", "recipe.yaml", "metrics.jsonl", "eval.json", "best.json", "environment.json")
    found = []
    for name in (*names, "checkpoints", "adapter", "export", "data_report.json", "plan.json"):
        try:
            found.append(os.stat(path / name).st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)
