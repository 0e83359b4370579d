"""Every pinned package is in docs/licenses.md with a license, and none asks for the GPL."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_licenses", ROOT / "docs" / "make_licenses.py")
licenses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(licenses)

TABLE = (ROOT / "docs" / "licenses.md").read_text()
ROWS = re.findall(r"^\| (\S+) \| (\S+) \| (.*) \|$", TABLE, re.MULTILINE)
LISTED = {name: (version, said) for name, version, said in ROWS}


def test_every_pinned_package_is_listed_with_its_version_and_no_other():
    listed = {(name, version) for name, (version, _) in LISTED.items() if name != "package"}
    assert listed == set(licenses.pinned()), "run: make licenses"


@pytest.mark.parametrize("name", [name for name, _ in licenses.pinned()])
def test_each_has_a_license_that_apache_2_can_stand_on(name):
    version, said = LISTED[name]
    assert said, f"{name} says nothing of its license"
    assert not licenses.is_copyleft(said), f"{name}: {said}"
    try:
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return
    if here.split("+")[0] == version:
        assert licenses.license_of(name) == said, "run: make licenses"


@pytest.mark.parametrize(
    ("text", "copyleft"),
    [
        ("GPL-3.0", True), ("AGPL-3.0-only", True), ("GNU General Public License v3", True),
        ("LGPL-3.0", False), ("MIT OR GPL-2.0", False), ("Apache-2.0", False), ("MPL-2.0", False),
    ],
)  # fmt: skip
def test_copyleft_is_told_from_the_rest(text, copyleft):
    assert licenses.is_copyleft(text) is copyleft
