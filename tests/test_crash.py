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
    "disk_full": [],
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
    """`campaigns(name)`: the result of that campaign; one process runs all of them."""
    place, missing = tmp_path_factory.mktemp("campaigns"), no_small_disk()
    asked = {n: flags for n, flags in CAMPAIGNS.items() if n != "disk_full" or not missing}
    script = Path(__file__).with_name("campaign_shares.py")
    command = [sys.executable, str(script), json.dumps(asked), str(place)]
    command = command if missing else ["unshare", "-Urm", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]

    def result_of(name):
        ended_early = place / f"{name}.txt"
        assert not ended_early.exists(), ended_early.read_text()
        return json.loads((place / f"{name}.json").read_text())

    return result_of


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
