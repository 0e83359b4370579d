"""Collect the facts about this machine that the checks need, without judging them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lorakit.dependencies import installed_version
from lorakit.errors import first_line
from lorakit.hardware import host_memory
from lorakit.storage.atomic_dir import existing_parent, free_bytes
from lorakit.storage.run_dir import folder_size

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate"),
    *("jinja2", "safetensors", "huggingface_hub", "triton", "torchvision", "lorakit"),
)
PROBE_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Driver:
    """Output of nvidia-smi; `gpus` has (name, total MiB, used MiB) of each GPU."""

    version: str = ""
    cuda: str = ""
    gpus: tuple[tuple[str, int, int], ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SystemInfo:
    """Facts for the checks; `driver` is None if there is no nvidia-smi."""

    python: tuple[int, ...] = ()
    system: str = ""
    driver: Driver | None = None
    torch: dict[str, Any] = field(default_factory=dict)
    bitsandbytes: dict[str, Any] = field(default_factory=dict)
    triton: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    visible: str | None = None
    ram_bytes: int = 0
    free_ram_bytes: int = 0
    free_disk: dict[str, int] = field(default_factory=dict)
    cache: str = ""
    cache_writable: bool = True
    home: str = ""
    home_writable: bool = True
    colab: bool = False
    drive_mounted: bool = False
    model: str | None = None
    hub: str = "not asked"


def collect_system_info(model: str | None = None, offline: bool = False) -> SystemInfo:
    """Collect the facts; with `model`, also ask the hub for this account's access to it."""
    memory = psutil.virtual_memory()
    cache = cache_folder()
    probed = run_import_probe()
    home = Path(os.path.expanduser("~"))  # stays ~ for a user without a home directory
    return SystemInfo(
        python=sys.version_info[:3],
        system=sys.platform,
        driver=read_driver(),
        **probed,
        packages=installed_versions(),
        needs=tuple(_needs()),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        ram_bytes=host_memory(),
        free_ram_bytes=memory.available,
        free_disk={"here": free_bytes(Path()), "model cache": free_bytes(cache)},
        cache=str(cache),
        cache_writable=writable(cache),
        home=str(home),
        home_writable=writable(home),
        colab="COLAB_RELEASE_TAG" in os.environ or _has("google.colab"),
        drive_mounted=Path("/content/drive/MyDrive").is_dir(),
        model=model,
        hub=ask_hub(model, offline) if model else "not asked",
    )


def read_driver() -> Driver | None:
    """Read driver and GPUs from nvidia-smi; None if it is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=driver_version,name,memory.total,memory.used"
    rows, error = _output([program, query, "--format=csv,noheader,nounits"])
    if error:
        return Driver(error=error)
    head, _ = _output([program])
    cuda = head.partition("CUDA Version:")[2].split() or [""]
    gpus, version = [], ""
    for row in rows.splitlines():
        fields = [field_text.strip() for field_text in row.split(",")]
        if len(fields) == 4 and fields[2].isdigit():
            version = fields[0]
            gpus.append((fields[1], int(fields[2]), int(fields[3]) if fields[3].isdigit() else 0))
    return Driver(version, cuda[0], tuple(gpus), None if gpus else "it lists no GPU")


def run_import_probe() -> dict[str, dict[str, Any]]:
    """Run `import_probe.py`; missing results become errors."""
    command = [sys.executable, "-m", "lorakit.doctor.import_probe"]
    error = "the probe printed no result"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
        text = done.stdout
        if done.returncode < 0:
            error = f"the import crashes (signal {-done.returncode})"
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"the import hangs (no answer in {PROBE_SECONDS} s)"
    facts: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    return {n: facts.get(n, {"error": error}) for n in ("torch", "bitsandbytes", "triton")}


def installed_versions() -> dict[str, str]:
    """Read the installed versions of PACKAGES."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {name: version for name, version in versions.items() if version}


def cache_folder() -> Path:
    """Folder in which huggingface_hub caches models."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def cached_models() -> list[tuple[str, int]]:
    """Hub models in this machine's cache, with their bytes."""
    found = []
    with suppress(OSError), os.scandir(cache_folder()) as entries:
        for entry in entries:
            kind, _, name = entry.name.partition("--")
            if kind == "models" and name:
                found.append((name.replace("--", "/", 1), folder_size(Path(entry.path))))
    return sorted(found)


def writable(folder: Path) -> bool:
    """Return True if a file can be created in `folder` or its nearest existing parent."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder)):
            return True
    except OSError:
        return False


def ask_hub(model: str, offline: bool) -> str:
    """Return `ok`, `local`, `offline`, `no token`, `gated`, `missing`, or an error text."""
    if Path(model).expanduser().is_dir():
        return "local"
    if offline or os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE"):
        return "offline"
    try:
        from huggingface_hub import auth_check, get_token
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        return f"huggingface_hub cannot be imported: {error}"
    try:
        auth_check(model)
    except GatedRepoError:
        return "gated" if get_token() else "no token"
    except RepositoryNotFoundError:
        return "missing"
    except Exception as error:  # network errors have many types; all are reported
        return f"{type(error).__name__}: {first_line(error)}"
    return "ok"


def _needs() -> Sequence[str]:
    try:
        return importlib.metadata.requires("lorakit") or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _output(command: list[str]) -> tuple[str, str | None]:
    """Run a command; return (stdout, error). nvidia-smi prints its errors to stdout."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{type(error).__name__}: {error}"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return "", lines[0] if lines else f"exit code {done.returncode}"
    return done.stdout, None
