"""The probe survives packages that are missing, crash or hang; test_doctor asks the real ones."""

import os
import subprocess
import time

import pytest

from lorakit.doctor import system_info


def fake(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder that comes before every installed package."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def test_a_torch_that_cannot_be_imported_is_a_finding(path):
    fake(path, "torch", "raise OSError('libcudart.so.12: cannot open shared object file')")
    found = system_info.run_import_probe()
    assert found["torch"] == {"error": "OSError: libcudart.so.12: cannot open shared object file"}
    assert "error" in found["bitsandbytes"]


def test_a_crash_and_a_hang_are_told_and_what_came_before_is_kept(path, monkeypatch):
    fake(
        path,
        "torch",
        "__version__ = '1'\nclass version: cuda = None\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n",
    )
    fake(path, "bitsandbytes", "import os; os.abort()")
    found = system_info.run_import_probe()
    assert found["torch"]["version"] == "1"
    assert found["bitsandbytes"] == {"error": "the import crashes (signal 6)"}
    reached = path / "reached"
    (path / "bitsandbytes" / "__init__.py").write_text(
        f"import pathlib, time; pathlib.Path({str(reached)!r}).touch(); time.sleep(3600)"
    )
    monkeypatch.setattr(system_info.subprocess, "run", until(reached))
    found = system_info.run_import_probe()
    assert found["torch"]["version"] == "1"
    assert found["bitsandbytes"] == {"error": "the import hangs (no answer in 180 s)"}


def until(file):
    """`subprocess.run` whose time is over once `file` is there, however slow the machine is."""

    def run(command, capture_output, text, timeout):
        assert capture_output
        assert timeout == system_info.PROBE_SECONDS == 180
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=text) as process:
            try:
                while not file.exists():
                    assert process.poll() is None
                    time.sleep(0.01)
                process.communicate(timeout=0.1)
            finally:
                process.kill()

    return run
