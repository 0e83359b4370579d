"""Check that installed packages have their minimum safe versions.

Every row is a fixed vulnerability or an untested version. pyproject.toml requires the same
versions; this check is for environments that were assembled by hand.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from lorakit.errors import DependencyError


@dataclass(frozen=True, slots=True)
class MinVersion:
    """Minimum version of a package, and the reason against older ones."""

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
    MinVersion("safetensors", "0.8", "the oldest version whose header checks were tested"),
)


@dataclass(frozen=True, slots=True)
class OutdatedPackage:
    """An installed package older than its minimum version."""

    floor: MinVersion
    found: str

    def __str__(self) -> str:
        f = self.floor
        return f"{f.package} {self.found} is too old, expected at least {f.version}: {f.reason}"

    @property
    def command(self) -> str:
        """Command that upgrades it."""
        return f"pip install --upgrade '{self.floor.package}>={self.floor.version}'"


def too_old() -> list[OutdatedPackage]:
    """List installed packages older than their minimum version; skip missing packages."""
    outdated = []
    for floor in FLOORS:
        try:
            installed = importlib.metadata.version(floor.package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(floor.version):
            outdated.append(OutdatedPackage(floor, installed))
    return outdated


def require_floors() -> None:
    """Refuse packages with known vulnerabilities.

    Raises:
        DependencyError: lists all outdated packages, with the upgrade command as hint.
    """
    outdated = too_old()
    if outdated:
        command = "pip install --upgrade " + " ".join(f.command.split(" ")[-1] for f in outdated)
        raise DependencyError("\n".join(map(str, outdated)), hint=command)


def _numbers(version: str) -> tuple[int, ...]:
    """Parse a version to four numbers and a flag that orders pre-releases before releases."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(n) for n in release.group().split(".")] if release else []
    early = (
        bool(re.match(r"[.-]?(?:a|b|rc|dev)\d*", version[release.end() :])) if release else False
    )
    return (*(numbers + [0] * 4)[:4], 0 if early else 1)
