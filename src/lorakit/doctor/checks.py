"""Facts enter; one Finding per check leaves: fine, worth knowing, or broken, with what mends it.

A check is one function and one row of CHECKS; its words stand in `doctor/known_issues.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorakit.dependencies import FLOORS
from lorakit.doctor.known_issues import TROUBLES
from lorakit.doctor.system_info import SystemInfo

GIB = 2**30
OLDEST_PYTHON = (3, 11)
LITTLE_RAM, LITTLE_DISK = 6 * GIB, 5 * GIB

State = Literal["ok", "note", "broken", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`trouble` names the row of TROUBLES that `command` comes from."""

    check: str
    state: State
    found: str
    command: str = ""
    trouble: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def examine(facts: SystemInfo) -> list[Finding]:
    """All checks, in order."""
    return [finding for check in CHECKS for finding in check(facts)]


def _bad(check: str, trouble: str, state: State = "broken", **words: Any) -> Finding:
    row = TROUBLES[trouble]
    cause, command = (text.format_map(words) for text in (row.cause, row.command))
    return Finding(check, state, cause, command, trouble)


def python(facts: SystemInfo) -> Iterator[Finding]:
    """Python is new enough."""
    version = ".".join(map(str, facts.python))
    if facts.python < OLDEST_PYTHON:
        yield _bad("python", "python", found=version)
    else:
        yield Finding("python", "ok", version)


def driver(facts: SystemInfo) -> Iterator[Finding]:
    """The driver answers."""
    smi = facts.driver
    if smi is None:
        yield Finding("driver", "skipped", "no nvidia-smi: runs go on the CPU")
    elif smi.error:
        yield _bad("driver", "driver", found=smi.error)
    else:
        cards = ", ".join(f"{name} {total / 1024:.0f} GiB" for name, total, _ in smi.cards)
        yield Finding("driver", "ok", f"{smi.version}, CUDA {smi.cuda}: {cards}")


def torch(facts: SystemInfo) -> Iterator[Finding]:
    """Torch imports, is built for the card there is, and sees it."""
    found, smi = facts.torch, facts.driver
    if "error" in found:
        yield _bad("torch", "torch", found=found["error"])
        return
    card = smi.cards[0][0] if smi and smi.cards else None
    if card and not found["cuda"]:
        cuda = smi.cuda if smi else ""
        yield _bad("torch", "cpu_torch", found=found["version"], card=card, cuda=cuda)
    elif card and smi and _numbers(found["cuda"])[:1] > _numbers(smi.cuda)[:1]:
        yield _bad("torch", "old_driver", found=found["cuda"], cuda=smi.cuda)
    elif card and not found["available"] and facts.visible in ("", "-1"):
        yield _bad("torch", "hidden_gpu", found=repr(facts.visible))
    elif card and not found["available"]:
        yield _bad("torch", "no_cuda", found=f"torch {found['version']}")
    else:
        built = f"CUDA {found['cuda']}" if found["cuda"] else "CPU"
        yield Finding("torch", "ok", f"{found['version']}, built for {built}")


def capability(facts: SystemInfo) -> Iterator[Finding]:
    """Torch has kernels for this card, and the card has bfloat16."""
    found = facts.torch
    if not found.get("available"):
        return
    major, minor = found["capability"]
    built = found["architectures"]
    words = {"card": found["card"], "found": f"{major}.{minor}", "sm": f"{major}{minor}"}
    # A kernel runs on its own major number from its minor on; "compute_" is compiled at the start.
    same = [a for a in built if a.startswith("sm_") and _version(a)[0] == major]
    newer = [a for a in built if a.startswith("compute_") and _version(a) <= (major, minor)]
    if not newer and not any(_version(a) <= (major, minor) for a in same):
        yield _bad("capability", "capability", built=" ".join(built), **words)
    elif major < 8:
        yield _bad("bfloat16", "no_bf16", "note", **words)
    else:
        yield Finding("bfloat16", "ok", f"{found['card']}: bfloat16 and flash attention")


def bitsandbytes(facts: SystemInfo) -> Iterator[Finding]:
    """4-bit works, on the card too."""
    found = facts.bitsandbytes
    if "error" in found:
        yield _bad("bitsandbytes", "bitsandbytes", found=found["error"])
    else:
        places = " and ".join(found["works_on"])
        yield Finding("bitsandbytes", "ok", f"{found['version']}, quantizes on {places}")


def triton(facts: SystemInfo) -> Iterator[Finding]:
    """The fast layers' compiler is there, where a card could use it."""
    if not facts.torch.get("available"):
        return
    if "error" in facts.triton:
        yield _bad("triton", "triton", found=facts.triton["error"])
    else:
        yield Finding("triton", "ok", facts.triton["version"])


def card_memory(facts: SystemInfo) -> Iterator[Finding]:
    """Nobody else holds the card's memory."""
    for number, (name, total, used) in enumerate(facts.driver.cards if facts.driver else ()):
        if used > 0.1 * total:
            text = (
                f"others hold {used / 1024:.1f} of {total / 1024:.1f} GiB of card {number} ({name})"
            )
            yield _bad("card memory", "card_in_use", "note", found=text)
        else:
            free = (total - used) / 1024
            yield Finding("card memory", "ok", f"{free:.1f} GiB free on card {number}")


def ram(facts: SystemInfo) -> Iterator[Finding]:
    """There is RAM to load a model with."""
    text = f"{facts.free_ram_bytes / GIB:.1f} GiB free of {facts.ram_bytes / GIB:.1f}"
    if facts.free_ram_bytes < LITTLE_RAM:
        yield _bad("RAM", "ram", "note", found=f"{text}: little for a 7B model")
    else:
        yield Finding("RAM", "ok", text)


def disk(facts: SystemInfo) -> Iterator[Finding]:
    """There is room for a run, and for the model that was asked for."""
    for place, free in facts.free_disk.items():
        needed = _download(facts.model) if place == "model cache" else 0
        text = f"{free / GIB:.1f} GiB free"
        if needed > free and facts.hub not in ("local", "offline"):
            text += f", {facts.model} takes {needed / GIB:.1f}"
            yield _bad(f"disk, {place}", "disk", found=f"{place}: {text}")
        elif free < LITTLE_DISK:
            state: State = "broken" if free < GIB else "note"
            yield _bad(f"disk, {place}", "disk", state, found=f"{place}: {text}")
        else:
            yield Finding(f"disk, {place}", "ok", text)


def folders(facts: SystemInfo) -> Iterator[Finding]:
    """Cache and home can be written."""
    if facts.cache_writable:
        yield Finding("model cache", "ok", "can be written")
    else:
        yield _bad("model cache", "cache", found=facts.cache)
    if not facts.home_writable:
        yield _bad("home", "home", "note", found=facts.home)


def packages(facts: SystemInfo) -> Iterator[Finding]:
    """No version with a known hole, none outside of what was tried."""
    have = facts.packages
    known = [f for f in FLOORS if f.package in have]
    old = {f.package: f for f in known if _numbers(have[f.package]) < _numbers(f.version)}
    for name, floor in old.items():
        text = f"{name} {have[name]} is too old, {floor.version} is the oldest safe one: "
        text += floor.reason
        yield _bad("versions", "too_old", found=text, packages=f"'{name}>={floor.version}'")
    odd = [line for line in _out_of_range(facts) if line[0] not in old]
    for name, text, wanted in odd:
        yield _bad("versions", "out_of_range", found=text, packages=f"'{name}{wanted}'")
    vision = have.get("torchvision")
    if vision and "torch" in have and _pair(vision) != _pair(have["torch"]):
        text = f"torchvision {vision} was built for another torch than {have['torch']}"
        yield _bad("versions", "torchvision", found=text)
    elif not old and not odd:
        named = ("transformers", "peft", "trl", "datasets")
        yield Finding("versions", "ok", ", ".join(f"{n} {have[n]}" for n in named if n in have))


def hub(facts: SystemInfo) -> Iterator[Finding]:
    """The hub gives the model to this account; only asked with --model."""
    if facts.model is None:
        return
    told = {"ok": "can be fetched", "local": "is a folder here", "offline": "offline: not asked"}
    by_answer = {"no token": "login", "gated": "gated", "missing": "no_model"}
    if facts.hub in told:
        state: State = "skipped" if facts.hub == "offline" else "ok"
        yield Finding("hub", state, f"{facts.model}: {told[facts.hub]}")
    elif facts.hub in by_answer:
        yield _bad("hub", by_answer[facts.hub], found=facts.model)
    else:
        yield _bad("hub", "hub", found=facts.hub)


def colab(facts: SystemInfo) -> Iterator[Finding]:
    """On Colab: a GPU, and a place that outlives the session."""
    if not facts.colab:
        return
    if not facts.driver or not facts.driver.cards:
        yield _bad("Colab", "colab_cpu", "note")
    if not facts.drive_mounted:
        yield _bad("Colab", "colab_drive", "note")
    else:
        yield Finding("Colab", "ok", "drive mounted")


CHECKS: list[Callable[[SystemInfo], Iterator[Finding]]] = [
    *(python, driver, torch, capability, bitsandbytes, triton, packages),
    *(card_memory, ram, disk, folders, hub, colab),
]


def _out_of_range(facts: SystemInfo) -> Iterator[tuple[str, str, str]]:
    """(package, what is wrong, its range) for lorakit's own requirements."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return
    for line in facts.needs:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        version = facts.packages.get(need.name)
        if version and need.marker is None and not need.specifier.contains(version, True):
            yield (
                need.name,
                f"{need.name} {version}; tried are {need.specifier}",
                str(need.specifier),
            )


def _download(model: str | None) -> int:
    """Bytes of a model whose size is known by name."""
    if model is None:
        return 0
    billions = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", model.lower())
    return int(float(billions[1]) * 2e9) if billions else 0


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", (version or "").partition("+")[0])[:3])


def _version(architecture: str) -> tuple[int, int]:
    """`sm_90a` -> (9, 0), `compute_120` -> (12, 0)."""
    digits = re.sub(r"\D", "", architecture)
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def _pair(version: str) -> int:
    """A number that torch 2.N and torchvision 0.(N+15) share."""
    numbers = _numbers(version)
    major, minor = (*numbers, 0, 0)[:2]
    return minor - 15 if major == 0 else minor
