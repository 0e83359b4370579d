"""`lorakit doctor` on this machine, and where torch is broken."""

import json
import os
import subprocess
import sys


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lorakit", "doctor", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_what_is_installed_here_is_well():
    """Memory, disk and cards are the machine's own; what the tests run on must be sound."""
    done = run("--json")
    value = json.loads(done.stdout)
    assert value["well"] == (done.returncode == 0)
    found = {f["check"]: f for f in value["findings"]}
    assert "RAM" in found
    for check in ("python", "torch", "bitsandbytes", "versions"):
        assert found[check]["state"] == "ok", found[check]
    import torch

    assert found["torch"]["found"].startswith(torch.__version__)


def test_it_runs_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run(PYTHONPATH=path)
    assert done.returncode == 1
    assert "ImportError: libtorch_cpu.so" in done.stdout
    assert "pip install --force-reinstall --no-cache-dir torch" in done.stdout
    assert "Traceback" not in done.stderr
