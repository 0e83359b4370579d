"""Start, resume and stop runs as processes of their own, which outlive the page and its server.

Each is the same `lorakit train` as in a terminal. Its recipe and its log are in `.lorakit-ui/`,
since the run directory belongs to the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lorakit.errors import RunError
from lorakit.recipe.loader import ResolvedRecipe
from lorakit.redact import redacted
from lorakit.storage.run_dir import RunDir, read_json, write_json, write_text
from lorakit.web.workspace import OWN, Workspace, read_settings, writer_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
LOG_BYTES = 2**16
HEADER = "# Written by `lorakit ui`; the same run: lorakit train FILE --output FOLDER\n"


@dataclass
class Launcher:
    """Processes of the runs in a workspace, by the name of the run."""

    workspace: Workspace
    _started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _stopped: dict[str, float] = field(default_factory=dict)

    def start(self, name: str, resolved: ResolvedRecipe) -> str:
        """Start a new run in the workspace; return its name in the list.

        Raises:
            RunError: the name cannot be used, or the folder is taken.
            WorkError: the disk is full.
        """
        if not _NAME.fullmatch(name):
            raise RunError(
                f"name: {name[:100]!a}: expected letters, digits, `.`, `_` and `-`, at most 80",
                hint="choose a name such as demo-lora-2",
            )
        folder = self.workspace.home / name
        key = folder.relative_to(self.workspace.root).as_posix()
        run = RunDir(folder)
        if self.process_of(key):
            raise RunError(
                f"{key}: another page has already started a run in this folder",
                hint="open that run, or choose another name",
            )
        if run.holds_work() or run.has_run() or writer_of(folder):
            raise RunError(
                f"{key}: already holds a run, which is never overwritten",
                hint="choose another name, or resume that run",
            )
        recipe = self.own(key, "yaml")
        kept = {
            k: v
            for k, v in resolved.recipe.model_dump(mode="json").items()
            if not resolved.origins[k].startswith("default")
        }
        write_text(recipe, HEADER + as_yaml(kept))
        self._launch(key, ["train", str(recipe), "--output", str(folder)])
        return key

    def resume(self, name: str) -> None:
        """Continue a stopped run from its last checkpoint.

        Raises:
            RunError: it is running, finished, has no recipe, or its recipe runs a model's own code.
        """
        run = self.workspace.find(name)
        if self.process_of(name):
            raise RunError(f"{name}: is running already", hint="open the run to watch it")
        if run.has_adapter():
            raise RunError(f"{name}: is finished", hint="train it further in a new run")
        refuse_code(run)
        self._launch(name, ["train", str(run.recipe), "--resume"])

    def stop(self, name: str) -> str:
        """Send SIGTERM, as `kill` does: the step is finished and saved; return what happens now.

        Raises:
            RunError: no process of this run was found.
        """
        process = self.process_of(name)
        if process is None:
            raise RunError(f"{name}: is not running", hint="reload the page")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        again = time.monotonic() - self._stopped.get(name, -1e9) < 600
        self._stopped[name] = time.monotonic()
        if again:
            return "stopped at once, without saving this step"
        return "stopping: this step is finished and saved first; stop once more to end it at once"

    def process_of(self, name: str) -> int | None:
        """Process that trains this run, also before it has locked its folder; None without one.

        A recorded process counts only if it began at the recorded time: numbers are used again.
        """
        started = self._started.get(name)
        if started is not None:
            if started.poll() is None:
                return started.pid
            del self._started[name]
        folder = self.workspace.root / name
        if not self.workspace.contains(folder):
            return None
        if (found := writer_of(folder)) is not None:
            return found
        record = read_json(self.own(name, "json"))
        if isinstance(record, dict):
            with contextlib.suppress(psutil.Error, TypeError, ValueError, KeyError, OverflowError):
                process = psutil.Process(record["process"])
                same = abs(process.create_time() - record["began"]) < 0.01
                if same and process.status() != psutil.STATUS_ZOMBIE:
                    return int(process.pid)
        return None

    def pending(self) -> list[dict[str, Any]]:
        """Runs that were started here and have no folder yet, or ended without one."""
        known, found = self.workspace.folders(), []
        with contextlib.suppress(OSError):
            for record in sorted((self.workspace.root / OWN).glob("*.json")):
                value = read_json(record)
                name = str(value.get("name", "")) if isinstance(value, dict) else ""
                if name and name not in known and self.own(name, "json") == record:
                    alive = self.process_of(name) is not None
                    reason = "" if alive else last_error(self.log(name))
                    found.append({"name": name, "alive": alive, "reason": reason})
        return found

    def forget(self, name: str) -> None:
        """Delete recipe and log of a run that ended without a folder."""
        if name not in self.workspace.folders() and not self.process_of(name):
            for kind in ("json", "log", "yaml"):
                self.own(name, kind).unlink(missing_ok=True)

    def log(self, name: str) -> str:
        """End of what the process printed; an empty text for a run of a terminal."""
        path = self.own(name, "log")
        if not self.workspace.contains(path):
            return ""
        try:
            with path.open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                handle.seek(max(0, size - LOG_BYTES))
                text = handle.read().decode(errors="replace")
        except OSError:
            return ""
        return redacted(text[text.find("\n") + 1 :] if size > LOG_BYTES else text)

    def ending(self, name: str) -> str:
        """Error at the end of the log of a run that was started here; an empty text for others."""
        log = self.log(name)
        return last_error(log) if "error:" in log else ""

    def own(self, name: str, kind: str) -> Path:
        """Path of our file of a run: `.lorakit-ui/NAME.yaml`, `.log` or `.json`."""
        return self.workspace.root / OWN / f"{re.sub(r'[^A-Za-z0-9._-]', '~', name)}.{kind}"

    def _launch(self, name: str, words: list[str]) -> None:
        path = self.own(name, "log")
        write_text(path, "")
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorakit", *words],
                cwd=self.workspace.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
            )
        self._started[name] = process
        self._stopped.pop(name, None)
        with contextlib.suppress(psutil.Error):
            began = psutil.Process(process.pid).create_time()
            write_json(
                self.own(name, "json"), {"name": name, "process": process.pid, "began": began}
            )


def refuse_code(run: RunDir) -> None:
    """Refuse a run whose recipe lets its model run code.

    Raises:
        RunError: the recipe sets `trust_remote_code`.
    """
    if read_settings(run).values.get("trust_remote_code"):
        raise RunError(
            f"{run.path.name}: its recipe sets trust_remote_code, which no page acts on",
            hint=f"use a terminal: {run.going_on()}",
        )


def as_yaml(values: dict[str, Any]) -> str:
    """Format settings as YAML, one JSON value a line."""
    return "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())


def last_error(log: str) -> str:
    """Error and hint at the end of a log as one sentence."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    if errors:
        found = lines[errors[-1] : errors[-1] + 6]
        hints = [line.removeprefix("hint: ") for line in found if line.startswith("hint:")]
        text = " ".join(line for line in found if not line.startswith("hint:"))
        return text.removeprefix("error: ") + (f": {hints[0]}" if hints else "") + "."
    last = lines[-1] if lines else "no output"
    return f"The process ended without an adapter ({last[:300]}): resume it, or read its log."
