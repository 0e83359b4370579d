"""Start and stop runs and exports as processes of their own, which outlive the page's server.

Each is the same `lorakit train` or `lorakit export` as in a terminal. Its recipe and its log are in
`.lorakit-ui/`, since the run directory belongs to the run.
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
from lorakit.recipe.loader import ResolvedRecipe, read_resolved
from lorakit.redact import redacted
from lorakit.storage.run_dir import RunDir, write_json, write_text
from lorakit.storage.run_lock import lock_owner
from lorakit.web.workspace import OWN, Workspace, read_facts

TRAIN, EXPORT = VERBS = ("train", "export")
# Formats of `lorakit export` without `hub`: no page uploads.
FORMATS = ("merged", "adapter", "gguf", "gguf-adapter", "ollama", "llama.cpp", "vllm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_QUANTIZATION = re.compile(r"[A-Za-z0-9_]{0,12}")
LOG_BYTES = 2**16
HEADER = "# Written by `lorakit ui`; the same run: lorakit train FILE --output FOLDER\n"


@dataclass
class Launcher:
    """Processes of the runs in a workspace, by the name of the run and the command."""

    workspace: Workspace
    _started: dict[tuple[str, str], subprocess.Popen[bytes]] = field(default_factory=dict)
    _stopped: dict[tuple[str, str], float] = field(default_factory=dict)

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
        if run.holds_work() or run.has_run() or lock_owner(folder):
            raise RunError(
                f"{key}: already holds a run, which is never overwritten",
                hint="choose another name, or resume that run",
            )
        recipe = self.own(key, TRAIN, "yaml")
        write_text(recipe, HEADER + as_yaml(resolved.given()))
        self._launch(key, TRAIN, str(recipe), "--output", str(folder))
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
        self._launch(name, TRAIN, str(run.recipe), "--resume")

    def export(self, name: str, form: str, quantization: str = "") -> None:
        """Write the adapter of a finished run in another format, which is verified.

        Raises:
            RunError: no adapter yet, an export is running, or the format is unknown.
        """
        run = self.workspace.find(name)
        if form not in FORMATS or not _QUANTIZATION.fullmatch(quantization):
            raise RunError(
                f"{form[:20]!a} {quantization[:20]!a}: not a format of this page",
                hint=f"formats: {', '.join(FORMATS)}; a quantization such as Q4_K_M",
            )
        if not run.has_adapter():
            raise RunError(f"{name}: has no adapter yet", hint="wait for its end, or resume it")
        if self.process_of(name, EXPORT):
            raise RunError(f"{name}: an export is running", hint="wait for it, or stop it")
        refuse_code(run)
        quant = [f"--quant={quantization}"] if quantization else []
        self._launch(name, EXPORT, str(run.path), "--to", form, *quant)

    def stop(self, name: str, verb: str = TRAIN) -> str:
        """Send SIGTERM, as `kill` does: the step is finished and saved; return what happens now.

        Raises:
            RunError: no process of this run was found.
        """
        process = self.process_of(name, verb)
        if process is None:
            raise RunError(f"{name}: is not running", hint="reload the page")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        if verb == EXPORT:
            return "the export is stopped; a format is kept only once it is complete"
        again = time.monotonic() - self._stopped.get((name, verb), -1e9) < 600
        self._stopped[name, verb] = time.monotonic()
        if again:
            return "stopped at once, without saving this step"
        return "stopping: this step is finished and saved first; stop once more to end it at once"

    def process_of(self, name: str, verb: str = TRAIN) -> int | None:
        """Process that trains or exports this run, also before it has locked its folder, or None.

        A recorded process counts only if it began at the recorded time: numbers are used again.
        """
        started = self._started.get((name, verb))
        if started is not None:
            if started.poll() is None:
                return started.pid
            del self._started[name, verb]
        folder = self.workspace.root / name
        if not self.workspace.contains(folder):
            return None
        if verb == TRAIN and (found := lock_owner(folder)) is not None:
            return found
        record = read_facts(self.own(name, verb, "json"))
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
            for record in sorted((self.workspace.root / OWN).glob(f"*.{TRAIN}.json")):
                name = str(read_facts(record).get("name", ""))
                if name and name not in known and self.own(name, TRAIN, "json") == record:
                    alive = self.process_of(name) is not None
                    reason = "" if alive else last_error(self.log(name))
                    found.append({"name": name, "alive": alive, "reason": reason})
        return found

    def forget(self, name: str) -> None:
        """Delete recipe and log of a run that ended without a folder."""
        if name not in self.workspace.folders() and not self.process_of(name):
            for kind in ("json", "log", "yaml"):
                self.own(name, TRAIN, kind).unlink(missing_ok=True)

    def log(self, name: str, verb: str = TRAIN) -> str:
        """End of what the process printed; an empty text for a run of a terminal."""
        path = self.own(name, verb, "log")
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

    def ending(self, name: str, verb: str = TRAIN) -> str:
        """Error at the end of the log of a process that was started here; else an empty text."""
        log = self.log(name, verb)
        return last_error(log) if "error:" in log else ""

    def own(self, name: str, verb: str, kind: str) -> Path:
        """Path of our file of a run: `.lorakit-ui/NAME.train.yaml`, `.log` or `.json`."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "~", name)
        return self.workspace.root / OWN / f"{plain}.{verb}.{kind}"

    def _launch(self, name: str, verb: str, *words: str) -> None:
        path = self.own(name, verb, "log")
        write_text(path, "")
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorakit", verb, *words],
                cwd=self.workspace.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
            )
        self._started[name, verb] = process
        self._stopped.pop((name, verb), None)
        with contextlib.suppress(psutil.Error):
            began = psutil.Process(process.pid).create_time()
            record = {"name": name, "process": process.pid, "began": began}
            write_json(self.own(name, verb, "json"), record)


def refuse_code(run: RunDir) -> None:
    """Refuse a run whose recipe lets its model run code.

    Raises:
        RunError: the recipe sets `trust_remote_code`.
    """
    if read_resolved(run.recipe).recipe.trust_remote_code:
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
