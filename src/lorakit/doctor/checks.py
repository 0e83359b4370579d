"""Check the facts about this machine, with a Finding and a fix for each problem.

A check is one function and one row of CHECKS; its texts are in `doctor/known_issues.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement

from lorakit.dependencies import too_old
from lorakit.doctor.known_issues import TROUBLES
from lorakit.doctor.system_info import SystemInfo
from lorakit.storage.units import GIB

OLDEST_PYTHON = (3, 11)
LITTLE_RAM, LITTLE_DISK = 6 * GIB, 5 * GIB

State = Literal["ok", "note", "broken", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; `trouble` is the key in TROUBLES that `command` comes from."""

    check: str
    state: State
    found: str
    command: str = ""
    trouble: str | None = None


def examine(facts: SystemInfo) -> list[Finding]:
    """Run all checks in order."""
    return [finding for check in CHECKS for finding in check(facts)]


def _bad(check: str, trouble: str, state: State = "broken", **values: Any) -> Finding:
    row = TROUBLES[trouble]
    cause, command = (text.format_map(values) for text in (row.cause, row.command))
    return Finding(check, state, cause, command, trouble)


def python(facts: SystemInfo) -> Iterator[Finding]:
    """Check that Python is new enough."""
    version = ".".join(map(str, facts.python))
    if facts.python < OLDEST_PYTHON:
        yield _bad("python", "python", found=version)
    else:
        yield Finding("python", "ok", version)


def driver(facts: SystemInfo) -> Iterator[Finding]:
    """Check that nvidia-smi works."""
    smi = facts.driver
    if smi is None:
        yield Finding("driver", "skipped", "no nvidia-smi: runs go on the CPU")
    elif smi.error:
        yield _bad("driver", "driver", found=smi.error)
    else:
        gpus = ", ".join(f"{name} {total / 1024:.0f} GiB" for name, total, _ in smi.gpus)
        yield Finding("driver", "ok", f"{smi.version}, CUDA {smi.cuda}: {gpus}")


def torch(facts: SystemInfo) -> Iterator[Finding]:
    """Check that torch imports, is built for the installed GPU, and finds it."""
    probed, smi = facts.torch, facts.driver
    if "error" in probed:
        yield _bad("torch", "torch", found=probed["error"])
        return
    gpu = smi.gpus[0][0] if smi and smi.gpus else None
    if gpu and not probed["cuda"]:
        cuda = smi.cuda if smi else ""
        yield _bad("torch", "cpu_torch", found=probed["version"], gpu=gpu, cuda=cuda)
    elif gpu and smi and _numbers(probed["cuda"])[:1] > _numbers(smi.cuda)[:1]:
        yield _bad("torch", "old_driver", found=probed["cuda"], cuda=smi.cuda)
    elif gpu and not probed["available"] and facts.visible in ("", "-1"):
        yield _bad("torch", "hidden_gpu", found=repr(facts.visible))
    elif gpu and not probed["available"]:
        yield _bad("torch", "no_cuda", found=f"torch {probed['version']}")
    else:
        built = f"CUDA {probed['cuda']}" if probed["cuda"] else "CPU"
        yield Finding("torch", "ok", f"{probed['version']}, built for {built}")


def capability(facts: SystemInfo) -> Iterator[Finding]:
    """Check that torch has kernels for this GPU, and that the GPU has bfloat16."""
    probed = facts.torch
    if not probed.get("available"):
        return
    major, minor = probed["capability"]
    built = probed["architectures"]
    values = {"gpu": probed["gpu"], "found": f"{major}.{minor}", "sm": f"{major}{minor}"}
    # A kernel runs on its major version from its minor version on; "compute_" is compiled at start.
    same = [a for a in built if a.startswith("sm_") and _version(a)[0] == major]
    newer = [a for a in built if a.startswith("compute_") and _version(a) <= (major, minor)]
    if not newer and not any(_version(a) <= (major, minor) for a in same):
        yield _bad("capability", "capability", built=" ".join(built), **values)
    elif major < 8:
        yield _bad("bfloat16", "no_bf16", "note", **values)
    else:
        yield Finding("bfloat16", "ok", f"{probed['gpu']}: bfloat16 and flash attention")


def bitsandbytes(facts: SystemInfo) -> Iterator[Finding]:
    """Check that 4-bit quantization works, also on the GPU."""
    probed = facts.bitsandbytes
    if "error" in probed:
        yield _bad("bitsandbytes", "bitsandbytes", found=probed["error"])
    else:
        devices = " and ".join(probed["works_on"])
        yield Finding("bitsandbytes", "ok", f"{probed['version']}, quantizes on {devices}")


def triton(facts: SystemInfo) -> Iterator[Finding]:
    """Check that triton, which compiles the fused layers' kernels, imports if there is a GPU."""
    if not facts.torch.get("available"):
        return
    if "error" in facts.triton:
        yield _bad("triton", "triton", found=facts.triton["error"])
    else:
        yield Finding("triton", "ok", facts.triton["version"])


def gpu_memory(facts: SystemInfo) -> Iterator[Finding]:
    """Check that other processes do not use the GPU's memory."""
    for index, (name, total, used) in enumerate(facts.driver.gpus if facts.driver else ()):
        if used > 0.1 * total:
            text = (
                f"others hold {used / 1024:.1f} of {total / 1024:.1f} GiB of GPU {index} ({name})"
            )
            yield _bad("GPU memory", "gpu_in_use", "note", found=text)
        else:
            free = (total - used) / 1024
            yield Finding("GPU memory", "ok", f"{free:.1f} GiB free on GPU {index}")


def ram(facts: SystemInfo) -> Iterator[Finding]:
    """Check that there is enough RAM to load a model."""
    text = f"{facts.free_ram_bytes / GIB:.1f} GiB free of {facts.ram_bytes / GIB:.1f}"
    if facts.free_ram_bytes < LITTLE_RAM:
        yield _bad("RAM", "ram", "note", found=f"{text}: little for a 7B model")
    else:
        yield Finding("RAM", "ok", text)


def disk(facts: SystemInfo) -> Iterator[Finding]:
    """Check that the disk has space for a run, and for the model of `--model`."""
    for folder, free in facts.free_disk.items():
        needed = _download(facts.model) if folder == "model cache" else 0
        text = f"{free / GIB:.1f} GiB free"
        if needed > free and facts.hub not in ("local", "offline"):
            text += f", {facts.model} takes {needed / GIB:.1f}"
            yield _bad(f"disk, {folder}", "disk", found=f"{folder}: {text}")
        elif free < LITTLE_DISK:
            state: State = "broken" if free < GIB else "note"
            yield _bad(f"disk, {folder}", "disk", state, found=f"{folder}: {text}")
        else:
            yield Finding(f"disk, {folder}", "ok", text)


def folders(facts: SystemInfo) -> Iterator[Finding]:
    """Check that cache and home folder can be written."""
    if facts.cache_writable:
        yield Finding("model cache", "ok", "can be written")
    else:
        yield _bad("model cache", "cache", found=facts.cache)
    if not facts.home_writable:
        yield _bad("home", "home", "note", found=facts.home)


def packages(facts: SystemInfo) -> Iterator[Finding]:
    """Check package versions against known vulnerabilities and the tested ranges."""
    versions = facts.packages
    outdated = too_old(versions)
    for old in outdated:
        yield _bad("versions", "too_old", found=str(old), packages=old.requirement)
    reported = {old.floor.package for old in outdated}
    out_of_range = [line for line in _out_of_range(facts) if line[0] not in reported]
    for name, text, specifier in out_of_range:
        yield _bad("versions", "out_of_range", found=text, packages=f"'{name}{specifier}'")
    vision = versions.get("torchvision")
    if vision and "torch" in versions and _pair(vision) != _pair(versions["torch"]):
        text = f"torchvision {vision} was built for another torch than {versions['torch']}"
        yield _bad("versions", "torchvision", found=text)
    elif not outdated and not out_of_range:
        shown = ("transformers", "peft", "trl", "datasets")
        yield Finding(
            "versions", "ok", ", ".join(f"{n} {versions[n]}" for n in shown if n in versions)
        )


def hub(facts: SystemInfo) -> Iterator[Finding]:
    """Check that this account can fetch the model; only with `--model`."""
    if facts.model is None:
        return
    outcomes = {
        "ok": "can be fetched",
        "local": "is a folder here",
        "offline": "offline: not asked",
    }
    by_answer = {"no token": "login", "gated": "gated", "missing": "no_model"}
    if facts.hub in outcomes:
        state: State = "skipped" if facts.hub == "offline" else "ok"
        yield Finding("hub", state, f"{facts.model}: {outcomes[facts.hub]}")
    elif facts.hub in by_answer:
        yield _bad("hub", by_answer[facts.hub], found=facts.model)
    else:
        yield _bad("hub", "hub", found=facts.hub)


def colab(facts: SystemInfo) -> Iterator[Finding]:
    """Check that Colab has a GPU and a mounted drive."""
    if not facts.colab:
        return
    if not facts.driver or not facts.driver.gpus:
        yield _bad("Colab", "colab_cpu", "note")
    if not facts.drive_mounted:
        yield _bad("Colab", "colab_drive", "note")
    else:
        yield Finding("Colab", "ok", "drive mounted")


CHECKS: list[Callable[[SystemInfo], Iterator[Finding]]] = [
    *(python, driver, torch, capability, bitsandbytes, triton, packages),
    *(gpu_memory, ram, disk, folders, hub, colab),
]


def _out_of_range(facts: SystemInfo) -> Iterator[tuple[str, str, str]]:
    """Yield (package, fault, range) for requirements of lorakit that are not met."""
    for need in map(Requirement, facts.needs):
        version = facts.packages.get(need.name)
        if version and need.marker is None and not need.specifier.contains(version, True):
            yield (
                need.name,
                f"{need.name} {version}, expected {need.specifier}",
                str(need.specifier),
            )


def _download(model: str | None) -> int:
    """Estimate the bytes of a model whose name has its size, such as 7b; 0 for others."""
    if model is None:
        return 0
    billions = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", model.lower())
    return int(float(billions[1]) * 2e9) if billions else 0


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", (version or "").partition("+")[0])[:3])


def _version(architecture: str) -> tuple[int, int]:
    """Parse `sm_90a` to (9, 0) and `compute_120` to (12, 0)."""
    digits = re.sub(r"\D", "", architecture)
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def _pair(version: str) -> int:
    """Return N for both torch 2.N and torchvision 0.(N+15)."""
    numbers = _numbers(version)
    major, minor = (*numbers, 0, 0)[:2]
    return minor - 15 if major == 0 else minor
