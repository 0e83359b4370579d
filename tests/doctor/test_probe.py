"""The probe survives packages that are missing, crash or hang; test_doctor asks the real ones."""

import os

import pytest

from lorakit.doctor import facts


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
    found = facts.probe()
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
    found = facts.probe()
    assert found["torch"]["version"] == "1"
    assert found["bitsandbytes"] == {"error": "the import crashes (signal 6)"}
    (path / "bitsandbytes" / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(facts, "PROBE_SECONDS", 2)
    found = facts.probe()
    assert found["torch"]["version"] == "1"
    assert "hangs" in found["bitsandbytes"]["error"]
