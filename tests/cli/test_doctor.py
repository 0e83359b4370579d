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


def test_this_machine_is_well():
    done = run("--json")
    value = json.loads(done.stdout)
    assert value["well"] == (done.returncode == 0)
    assert {"python", "torch", "bitsandbytes", "RAM"} <= {f["check"] for f in value["findings"]}
    assert done.returncode == 0, done.stdout
    import torch

    told = next(f["found"] for f in value["findings"] if f["check"] == "torch")
    assert told.startswith(torch.__version__)


def test_it_runs_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run(PYTHONPATH=path)
    assert done.returncode == 1
    assert "ImportError: libtorch_cpu.so" in done.stdout
    assert "pip install --force-reinstall --no-cache-dir torch" in done.stdout
    assert "Traceback" not in done.stderr
