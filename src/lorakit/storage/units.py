"""Units of memory, and sizes as recipes and commands write them: `12GB`, `15 GiB`."""

from __future__ import annotations

import re

UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
GIB, MIB = UNITS["GiB"], UNITS["MiB"]


def parse_size(text: str) -> int | None:
    """Parse a size to bytes; None for zero and for text of another form."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip())
    return int(float(match[1]) * UNITS[match[2]]) or None if match else None
