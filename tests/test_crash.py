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


CAMPAIGNS = {
    "crash": ["--kills", "3", "--kills-per-run", "3", "--seed", "1"],
    "corruption": ["--corruptions", "60", "--seed", "1"],
    "disk_full": ["--steps", "3"],
}


def no_small_disk():
    """Why this machine gives no disk of a chosen size, or nothing."""
    if not shutil.which("unshare"):
        return "unshare is not installed: no disk of a chosen size"
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "this machine gives no mount namespace (unshare -Urm): no disk of a chosen size"
    return ""


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory):
    """Each as its user runs it, all at once: one process uses one core."""
    started, place = {}, tmp_path_factory.mktemp("campaigns")
    for name, flags in CAMPAIGNS.items():
        if name == "disk_full" and no_small_disk():
            continue
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
        with (place / name).open("w") as out:
            started[name] = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    yield lambda name: result_of(started[name], place / name)
    for process in started.values():
        process.kill()
        process.wait()


def result_of(process, said):
    process.wait(timeout=800)
    text = said.read_text()
    assert process.returncode == 0, text[-3000:]
    return json.loads(text[text.index("{\n") :])


def test_killed_runs_resume_to_the_same_bytes(campaigns):
    result = campaigns("crash")
    assert result["failures"] == []
    assert result["kills"] >= 3
    assert sum(result["kills_while"].values()) == result["kills"]


def test_damaged_checkpoints_are_passed_over(campaigns):
    result = campaigns("corruption")
    assert result["failures"] == []
    assert result["corruptions"] >= 60
    assert len(result["kinds"]) >= 8
    assert result["resumed_bit_identical"] >= 1


def test_a_full_disk_tears_nothing(campaigns):
    if why := no_small_disk():
        pytest.skip(why)
    result = campaigns("disk_full")
    assert result["failures"] == []
    assert any("saving" in end for end in result["ends"])
    assert "MB missing" in result["messages"]["filled since, saving"]
    assert "read-only" in result["messages"]["read-only"].lower()


@pytest.mark.parametrize(
    ("name", "count"), [("crash", 200), ("corruption", 1000), ("disk_full", 64)]
)
def test_the_committed_figures_hold_no_failure(name, count):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["failures"] == []
    key = {"crash": "kills", "corruption": "corruptions", "disk_full": "disks"}[name]
    assert result[key] >= count
