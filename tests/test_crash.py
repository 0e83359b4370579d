"""A share of the campaigns in benchmarks/: kills, damaged checkpoints, full disks, real processes.

The machinery is theirs; `benchmarks/results` has the full figures.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def benchmark(name, *flags):
    """Run a benchmark as its user does; it forks, which a process with threads must not."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def test_killed_runs_resume_to_the_same_bytes():
    result = benchmark("crash", "--kills", "3", "--kills-per-run", "3", "--seed", "1")
    assert result["failures"] == []
    assert result["kills"] >= 3
    assert sum(result["kills_while"].values()) == result["kills"]


def test_damaged_checkpoints_are_passed_over():
    result = benchmark("corruption", "--corruptions", "60", "--seed", "1")
    assert result["failures"] == []
    assert result["corruptions"] >= 60
    assert len(result["kinds"]) >= 8
    assert result["resumed_bit_identical"] >= 1


def test_a_full_disk_tears_nothing():
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed: no disk of a chosen size")
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(
            "this machine gives no mount namespace (unshare -Urm): no disk of a chosen size"
        )
    result = benchmark("disk_full", "--steps", "3")
    assert result["failures"] == []
    assert any("saving" in end for end in result["ends"])
    assert "MB missing" in result["messages"]["filled since, saving"]


@pytest.mark.parametrize(
    ("name", "count"), [("crash", 200), ("corruption", 1000), ("disk_full", 64)]
)
def test_the_committed_figures_hold_no_failure(name, count):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["failures"] == []
    key = {"crash": "kills", "corruption": "corruptions", "disk_full": "disks"}[name]
    assert result[key] >= count
