"""Every module imports, and a run stops and saves, on a system without Unix-only parts."""

import subprocess
import sys
from pathlib import Path

import lorakit

PROGRAM = """
import importlib, os, signal, sys
import datasets, peft, psutil, rich.console, torch, transformers, trl
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "triton", "readline"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2"):
    if hasattr(signal, name):
        delattr(signal, name)
del os.killpg, os.fork, os.getuid
for module in {modules!r}:
    importlib.import_module(module)
assert "matplotlib" not in sys.modules  # half a second that only a chart needs
from lorakit.train.signals import catch_signals
with catch_signals() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.asked and stop.exit_code == 130
from lorakit.errors import DependencyError
from lorakit.serve.engines import Place
from lorakit.serve.main import serve
try:
    serve([], Place("127.0.0.1", 0, None), "auto", None)
except DependencyError as error:
    assert "WSL 2" in error.hint
else:
    raise AssertionError
"""


def test_all_modules_import_without_unix():
    package = Path(lorakit.__file__).parent
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
    ]
    # Triton's kernels are imported where they run.
    names = [n for n in names if not n.endswith(("_triton", "__main__", "import_probe"))]
    names = [name.removesuffix(".__init__") for name in names]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(modules=names)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
