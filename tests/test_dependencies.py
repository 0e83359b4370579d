"""Old versions with known holes are named, with the command that mends it."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from lorakit.dependencies import FLOORS, require_floors, too_old
from lorakit.errors import DependencyError

ROOT = Path(__file__).parents[1]


def test_what_is_installed_here_is_new_enough():
    assert too_old() == []
    require_floors()


@pytest.mark.parametrize(
    ("package", "version", "old"),
    [
        ("torch", "2.9.1", True), ("torch", "2.10.0+cu128", False), ("torch", "2.10.0rc2", True),
        ("torch", "2.10.0.dev20260101", True), ("torch", "2.13.0+cpu", False),
        ("transformers", "5.10.0", True), ("transformers", "5.9.0", True),
        ("transformers", "5.10.1", False), ("transformers", "5.10.1.post1", False),
        ("transformers", "5.100", False), ("jinja2", "3.1.5", True), ("jinja2", "3.2", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(monkeypatch, package, version, old):
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == package else "99"
    )
    found = too_old()
    assert [f.floor.package for f in found] == ([package] if old else [])
    if old:
        with pytest.raises(DependencyError, match="is too old") as caught:
            require_floors()
        assert version in str(found[0])
        assert caught.value.hint.startswith(f"pip install --upgrade '{package}>=")


def test_a_package_that_is_not_there_is_not_too_old(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert too_old() == []


def test_pyproject_asks_for_the_floors_or_higher(monkeypatch):
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = {}
    for line in asked:
        name, _, version = line.partition(">=")
        lowest[name.strip()] = version.split(",")[0]
    for floor in FLOORS:
        assert floor.package in lowest, f"{floor.package} is used and must be asked for"
    monkeypatch.setattr(importlib.metadata, "version", lowest.__getitem__)
    assert too_old() == []


def test_extras_name_what_the_code_asks_for():
    import tomllib
    from pathlib import Path

    from lorakit.data.sources.http import PACKAGES
    from lorakit.recipe.schema import Recipe

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    named = {key: {line.split(">")[0] for line in lines} for key, lines in extras.items()}
    assert named["cloud"] == set(PACKAGES.values())
    trackers = Recipe.model_json_schema()["properties"]["report_to"]["items"]["enum"]
    assert named["track"] <= set(trackers)


def test_the_lowest_versions_are_those_of_the_ranges():
    from tests.lowest_versions import lowest

    text = """
        [project]
        dependencies = ["torch>=2.10,<3", "peft>=0.21,<1", "x[y]>=1.2"]
        [project.optional-dependencies]
        serve = ["starlette>=0.50,<2", "lorakit[gguf]"]
        gguf = ["protobuf>=5.26,<9"]
    """
    found = {"peft": "0.21", "x": "1.2", "starlette": "0.50", "protobuf": "5.26"}
    assert lowest(text) == found
