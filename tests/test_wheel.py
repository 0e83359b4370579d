"""The wheel has every file of the package, and trains from there; see `make wheel-demo`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("lorakit-*-py3-none-any.whl")
    return made


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    package = ROOT / "src" / "lorakit"
    files = {
        f"lorakit/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        entry = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        text = archive.read(metadata).decode()
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {"lorakit/py.typed", "lorakit/assets/demo.yaml"} <= files
    assert "lorakit = lorakit.cli.main:main" in entry
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text


def test_the_installed_wheel_trains_in_a_fresh_folder(wheel, tiny_model_dir, tmp_path):
    """Its own data, templates and pages: nothing of the checkout is on the path."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    assert (site / "bin" / "lorakit").exists()
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import lorakit; print(lorakit.__file__)")).is_relative_to(site)
    small = ["cutoff_len=128", "max_steps=1", "val_size=2", "dtype=float32"]
    model = ["--model", tiny_model_dir, "--data", "demo", "--output", "run", "--offline"]
    run("-m", "lorakit", "train", *model, *small)
    assert (work / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "<svg" in (work / "run" / "report.html").read_text()
