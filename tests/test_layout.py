"""The rules that keep the code livable: import order, sizes, first lines, a test file each."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorakit"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder or module may import from its own layer and from those above it in this list.
LAYERS = [
    {"errors", "types", "redact", "console"},
    {"dependencies", "hardware", "recipe", "storage"},
    {"data", "distributed", "doctor", "model", "ops"},
    {"engine"},
    {"train"},
    {"planning"},
    {"bench", "display"},
    {"report"},
    {"inference"},
    {"evaluation"},
    {"reinforcement"},
    {"export"},
    {"objects", "serve"},
    {"pipeline"},
    {"results"},
    {"run"},
    {"sweeps"},
    {"api"},
    {"web"},
    {"cli", "__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
UNTESTED = {"__init__", "__main__"}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def imports_of(path):
    """Every lorakit module that `path` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] == "lorakit" and "." in name}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = LAYER_OF[parts[0]]
    for name in imports_of(path):
        part = name.split(".")[1]
        if part in LAYER_OF:
            assert LAYER_OF[part] <= own, f"{module_name(path)} imports {name} from a later layer"


def graph_of_modules():
    names = {module_name(p) for p in FILES}
    return {module_name(p): imports_of(p) & names for p in FILES}


def graph_of_folders():
    """The same for the folders and modules of the top level."""
    graph = {}
    for name, others in graph_of_modules().items():
        if "." in name:
            own = graph.setdefault(name.split(".")[1], set())
            own |= {o.split(".")[1] for o in others} - {name.split(".")[1]}
    return graph


@pytest.mark.parametrize("make", [graph_of_modules, graph_of_folders])
def test_no_import_cycles(make):
    graph = make()
    state = {}

    def visit(name, trail):
        assert state.get(name) != "open", f"cycle: {' -> '.join([*trail, name])}"
        if state.get(name) == "done":
            return
        state[name] = "open"
        for other in graph.get(name, ()):
            visit(other, [*trail, name])
        state[name] = "done"

    for name in graph:
        visit(name, [])


def test_few_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_each_module_has_a_name_of_its_own():
    """Commands aside, which are called as what they run."""
    names = [p.stem for p in FILES if p.stem != "__init__" and p.parent.name != "cli"]
    assert sorted({n for n in names if names.count(n) > 1}) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short_and_introduced(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 600, f"{path.name} has {text.count(chr(10))} lines"
    if text.strip():
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 80, f"{path.name}: {node.name} has {size} lines"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem not in UNTESTED], ids=module_name)
def test_each_module_has_its_test_file(path):
    relative = path.relative_to(PACKAGE)
    mirror = ROOT / "tests" / relative.parent / f"test_{relative.name}"
    assert mirror.exists(), f"no {mirror.relative_to(ROOT)}"


def test_no_catch_all_modules():
    assert not [p for p in FILES if p.stem in {"utils", "helpers", "common", "misc"}]


def requirements(names):
    """Names of packages, spelled as pip compares them."""
    return {re.split(r"[ <>=!~;\[]", name)[0].lower().replace("_", "-") for name in names}


def test_every_imported_package_is_declared():
    """What is imported without being declared goes away with the package that brought it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [row for rows in project["optional-dependencies"].values() for row in rows]
    declared = requirements([*project["dependencies"], *extras])
    # Part of CUDA builds of torch; of a notebook's kernel.
    declared |= {"triton", "ipython"}
    owners = importlib.metadata.packages_distributions()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in (n.split(".")[0] for n in names):
                if name in sys.stdlib_module_names or name == "lorakit":
                    continue
                owner = requirements(owners.get(name, [name]))
                assert owner & declared, f"{path.name} imports {name}, which is not declared"


def test_no_range_ends_before_the_next_major_version():
    """Ranges that end at a minor version stop an install within weeks of a release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    shipped = [row for name, rows in extras.items() if name != "dev" for row in rows]
    for row in (*project["dependencies"], *shipped):
        assert not re.search(r"<\d+\.", row), row


def test_no_two_public_functions_or_classes_have_one_name():
    """Commands in `cli/` aside, which are named as what they run."""
    places = {}
    for path in FILES:
        module = path.relative_to(PACKAGE).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body if module[:4] != "cli/" else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
