"""Checkpoints of every format that was ever released resume, and come to the end they came to."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.atomic_dir import FORMAT
from lorakit.storage.run_dir import RunDir, read_metrics

GOLDEN = Path(__file__).parent / "golden"


def test_the_present_format_has_its_golden_run():
    assert (GOLDEN / f"format_{FORMAT}").is_dir()


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir()))
def test_a_golden_checkpoint_is_resumed(tmp_path, name):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    run = RunDir(tmp_path / name / "run")
    expected = json.loads((tmp_path / name / "expected.json").read_text())["losses"]
    kept = json.loads(run.metrics.read_text().splitlines()[4])
    assert kept["loss"] == expected[4]
    fit(load_recipe(run.recipe), Console(quiet=True), resume=True)
    losses = [row["loss"] for row in read_metrics(run)]
    assert losses == pytest.approx(expected, abs=1e-5, rel=0)
    assert len(losses) == 8
