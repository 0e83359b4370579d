"""Check that installed packages have their minimum safe versions.

Every row is a fixed vulnerability or an untested version. pyproject.toml requires the same
versions; this check is for environments that were assembled by hand.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.version import Version

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
    def requirement(self) -> str:
        """Requirement of its minimum version, quoted for a shell."""
        return f"'{self.floor.package}>={self.floor.version}'"


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old(versions: Mapping[str, str] | None = None) -> list[OutdatedPackage]:
    """List packages older than their minimum version; skip missing packages.

    Args:
        versions: by package; by default those installed here.
    """
    outdated = []
    for floor in FLOORS:
        found = (
            installed_version(floor.package) if versions is None else versions.get(floor.package)
        )
        if found and Version(found) < Version(floor.version):
            outdated.append(OutdatedPackage(floor, found))
    return outdated


def require_floors() -> None:
    """Refuse packages with known vulnerabilities.

    Raises:
        DependencyError: lists all outdated packages, with the upgrade command as hint.
    """
    outdated = too_old()
    if outdated:
        command = "pip install --upgrade " + " ".join(old.requirement for old in outdated)
        raise DependencyError("\n".join(map(str, outdated)), hint=command)
