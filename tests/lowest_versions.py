"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

    python tests/lowest_versions.py > constraints-lowest.txt

Dependencies of the package and of the extras that it imports; the tools of `dev` are left to pip.
torch is left out: its version and build are an argument of `make test-oldest`.
"""

import re
import tomllib
from pathlib import Path

EXTRAS = ("serve", "gguf")
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(text: str) -> dict[str, str]:
    """The lowest version of each dependency in the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    found = {}
    for line in asked:
        parts = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line)
        if parts and parts[1] != "torch":
            found[parts[1]] = parts[2]
    return found


if __name__ == "__main__":
    for name, version in lowest(PROJECT.read_text()).items():
        print(f"{name}=={version}")
