"""Installed versions enter; those that are too old to be safe leave, each with its reason.

Every row is a hole that was found and closed: pyproject.toml asks for at least these versions, and
this is for the environment that was put together by hand.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from lorakit.errors import DependencyError


@dataclass(frozen=True, slots=True)
class MinVersion:
    """The first version of a package that is used, and what happened below it."""

    package: str
    version: str
    reason: str


FLOORS = (
    MinVersion(
        "torch",
        "2.10",
        "a crafted checkpoint corrupts memory even with weights_only (CVE-2026-24747)",
    ),
    MinVersion(
        "transformers",
        "5.10.1",
        "config.json runs code of a hub kernel (CVE-2026-4372), names of chat templates write "
        "outside the folder (CVE-2026-9856)",
    ),
    MinVersion("jinja2", "3.1.6", "chat templates escape the sandbox (CVE-2025-27516)"),
    MinVersion("safetensors", "0.8", "the version whose header checks were tried here"),
)


@dataclass(frozen=True, slots=True)
class OutdatedPackage:
    """A package below its floor."""

    floor: MinVersion
    found: str

    def __str__(self) -> str:
        f = self.floor
        return f"{f.package} {self.found} is too old (at least {f.version} is needed): {f.reason}"

    @property
    def command(self) -> str:
        """What mends it."""
        return f"pip install --upgrade '{self.floor.package}>={self.floor.version}'"


def too_old() -> list[OutdatedPackage]:
    """Installed packages below their floor. One that is not installed is none of them."""
    found = []
    for floor in FLOORS:
        try:
            installed = importlib.metadata.version(floor.package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(floor.version):
            found.append(OutdatedPackage(floor, installed))
    return found


def require_floors() -> None:
    """Refuse to work with packages whose holes are known.

    Raises:
        DependencyError: all that are too old, and the command that mends it.
    """
    found = too_old()
    if found:
        command = "pip install --upgrade " + " ".join(f.command.split(" ")[-1] for f in found)
        raise DependencyError("\n".join(map(str, found)), hint=command)


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, four numbers; a release candidate is older than its release."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(n) for n in release.group().split(".")] if release else []
    early = (
        bool(re.match(r"[.-]?(?:a|b|rc|dev)\d*", version[release.end() :])) if release else False
    )
    return (*(numbers + [0] * 4)[:4], 0 if early else 1)
