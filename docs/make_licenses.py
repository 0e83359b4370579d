"""Write docs/licenses.md: what each pinned package says of its own license.

python docs/make_licenses.py > docs/licenses.md
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """\
# Licenses of the packages that lorakit uses

From the metadata of the packages in `constraints.txt`, by `make licenses`. lorakit itself is
Apache-2.0; the models you tune have their own. Shipped with lorakit: uPlot (MIT, `web/static`).

| package | version | license |
|---|---|---|
"""
# One spelling for what the metadata says in many.
SPELLED = {
    "Apache": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause", "ISC License": "ISC",
    "The MIT License (MIT)": "MIT", "Apache License, Version 2.0": "Apache-2.0", "PSFL": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}  # fmt: skip


# Read in the package's own files, since its metadata names none.
IN_FILES = {"axe-playwright-python": "MIT AND MPL-2.0"}


def pinned():
    """(name, version) of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [tuple(line.split("==")) for line in lines if "==" in line and line[0] != "#"]


def license_of(name):
    """What the package says: an SPDX expression, field, classifier, or head of its license file."""
    about = importlib.metadata.metadata(name)
    field = (about.get("License") or "").strip()
    told = 0 < len(field) < 60 and field != "UNKNOWN"
    found = about.get("License-Expression") or (field if told else None)
    classes = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if "License ::" in c]
    said = found or (classes[0] if classes else IN_FILES.get(name, field.split("\n")[0][:60]))
    return SPELLED.get(said, said)


def is_copyleft(text):
    """A GPL or AGPL that no other license stands beside; the LGPL lets a program use it."""
    choices = re.split(r"\s+OR\s+", text)
    return all(re.search(r"(?<!L)GPL|GNU (Affero )?General Public", c) for c in choices)


def page():
    """The whole file."""
    rows = sorted(pinned(), key=lambda row: row[0].lower())
    return HEAD + "".join(f"| {n} | {v} | {license_of(n)} |\n" for n, v in rows)


if __name__ == "__main__":
    sys.stdout.write(page())
