"""What runs code, opens a shell or trusts a stranger stays out of the source, but for named places.

Looked for in the syntax tree: a word in a comment is no fault, a call by another name is one.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
# Modules that turn bytes into programs, or hide the network.
MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml"}
CALLS = {
    "eval": "runs text as code", "exec": "runs text as code", "compile": "makes code of text",
    "__import__": "imports by a computed name", "breakpoint": "waits for a debugger",
    "torch.load": "loads a pickle", "os.execvp": "starts another program",
    "torch.hub.load": "runs code from a repository", "pandas.read_pickle": "loads a pickle",
    "os.system": "opens a shell", "os.popen": "opens a shell", "pty.spawn": "opens a shell",
    "subprocess.getoutput": "opens a shell", "subprocess.getstatusoutput": "opens a shell",
    "tempfile.mktemp": "names a file that another may make first",
    "ssl._create_unverified_context": "trusts any server",
    "tarfile.open": "unpacks an archive", "shutil.unpack_archive": "unpacks an archive",
}  # fmt: skip
# Arguments that must not have these values, whatever is called.
ARGUMENTS = {
    "shell": True, "trust_remote_code": True, "weights_only": False, "verify": False,
    "allow_pickle": True, "autoescape": False, "debug": True,
}  # fmt: skip
# (file, what): why it is right there.
ALLOWED = {
    ("benchmarks/disk_full.py", "os.execvp"): "the script again, within a mount namespace",
    ("benchmarks/corruption.py", "imports pickle"): "plants one that must never be loaded",
}
NEEDS_TIMEOUT = {"urlopen", "requests.get", "requests.post", "httpx.get", "httpx.post"}
# Our own loopback server of llama.cpp, in a process that has a time limit.
NO_TIMEOUT_NEEDED = {"export/llama_cpp.py"}


def name_of(node):
    """`a.b.c` of a name or attribute; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return ""


def aliases(tree):
    """What the names of a file stand for: `from os import system as s` makes s os.system."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def faults(text, place=""):
    """(line, what is wrong) of each forbidden construct in a source."""
    tree, found = ast.parse(text), []
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            said = [f"imports {n}" for n in names if str(n).split(".")[0] in MODULES]
            found += [(node.lineno, words) for words in said if (place, words) not in ALLOWED]
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = name_of(node).partition(".")
            name = known.get(head, head) + dot + rest
            if name in CALLS and (place, name) not in ALLOWED and not _is_part(node, tree):
                found.append((node.lineno, f"{name} {CALLS[name]}"))
        if isinstance(node, ast.Call):
            found += _call_faults(node, known, place)
        if isinstance(node, ast.Dict):
            pairs = [
                (k.value, v) for k, v in zip(node.keys, node.values, strict=True)
                if isinstance(k, ast.Constant) and isinstance(k.value, str)
            ]  # fmt: skip
            found += [(node.lineno, w) for k, v in pairs if (w := _argument_fault(k, v))]
    return found


def _is_part(node, tree):
    """`compile` in `re.compile` is an attribute's own name, not the built-in."""
    return isinstance(node, ast.Attribute) and "." not in name_of(node)


def _call_faults(node, known, place):
    found = [(node.lineno, w) for k in node.keywords if (w := _argument_fault(k.arg, k.value))]
    head, dot, rest = name_of(node.func).partition(".")
    name = known.get(head, head) + dot + rest
    if any(name == n or name.endswith(f".{n}") for n in NEEDS_TIMEOUT):
        given = {k.arg for k in node.keywords}
        if "timeout" not in given and place not in NO_TIMEOUT_NEEDED:
            found.append((node.lineno, f"{name} without a timeout"))
    return found


def _argument_fault(name, value):
    if name in ARGUMENTS and isinstance(value, ast.Constant) and value.value is ARGUMENTS[name]:
        return f"{name}={value.value}"
    return None


def place_of(path):
    base = ROOT / "src" / "lorakit"
    return path.relative_to(base if base in path.parents else ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=place_of)
def test_nothing_runs_code_or_trusts_a_stranger(path):
    found = faults(path.read_text(), place_of(path))
    assert not found, "\n".join(f"{path}:{line}: {what}" for line, what in found)


PLANTED = [
    "import pickle", "from pickle import loads", "import dill as d", "import yaml",
    "from yaml import load", "eval('1')", "exec('a = 1')", "x = eval", "__import__(name)",
    "import torch\ntorch.load('x.bin')", "from torch import load\nload('x')",
    "import torch as t\nt.load('x')", "import os\nos.execvp(a, b)",
    "import os\nos.system('ls')", "from os import system\nsystem('ls')",
    "import os as o\no.popen(a)",
    "import subprocess\nsubprocess.run('ls', shell=True)", "run(x, shell=True)",
    "import tempfile\ntempfile.mktemp()", "from tempfile import mktemp as m\nm()",
    "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(**{'trust_remote_code': True})",
    "options = {'weights_only': False}", "torch.load(x, weights_only=False)",
    "from urllib.request import urlopen\nurlopen(u)", "import requests\nrequests.get(u)",
    "requests.get(u, verify=False, timeout=1)", "import tarfile\ntarfile.open(x)",
    "import torch\ntorch.hub.load('a/b', 'c')", "np.load(x, allow_pickle=True)",
]  # fmt: skip


@pytest.mark.parametrize("text", PLANTED)
def test_each_planted_fault_is_found(text):
    assert faults(text)


@pytest.mark.parametrize(
    "text",
    [
        "# eval(x), pickle, shell=True\n'torch.load'",
        "import re\nre.compile('a')",
        "model.eval()",
        "import json\njson.load(h)",
        "self.eval = 1\nx.exec",
        "run(['ls'], shell=False)",
        "f(trust_remote_code=recipe.trust_remote_code)",
        "from urllib.request import urlopen\nurlopen(u, timeout=3)",
    ],
)
def test_what_is_right_is_let_pass(text):
    assert not faults(text)


def test_no_place_is_allowed_that_is_no_more():
    for place, what in ALLOWED:
        home = ROOT if place.startswith("benchmarks") else ROOT / "src" / "lorakit"
        found = faults((home / place).read_text())
        assert any(words.startswith(what) for _, words in found), (place, what)
