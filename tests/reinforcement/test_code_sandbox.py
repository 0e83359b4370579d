"""Tests of sampled code: they pass only if they ran to their end, within the limits."""

import subprocess
import sys

import pytest

from lorakit.reinforcement.code_sandbox import UnitTests, code_in, joined_tests, run_tests

MIB = 2**20
ADD = "def add(a, b):\n    return a + b"


def isolated():
    probe = [sys.executable, "-c", "import ctypes; print(ctypes.CDLL(None).unshare(0x10020000))"]
    return subprocess.run(probe, capture_output=True, text=True).stdout.strip() == "0"


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        (ADD, True),
        ("def add(a, b):\n    return a - b", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("print('ok')\nraise SystemExit", False),
        ("def add(a, b:", False),
    ],
    ids=["right", "wrong", "exit", "hard exit", "printed", "syntax"],
)
def test_only_tests_that_reach_their_end_pass(code, passed):
    assert run_tests(code, "assert add(1, 2) == 3", 20, 512 * MIB).passed is passed


def test_time_and_memory_are_limited():
    run = run_tests("while True: pass", "", 1, 512 * MIB)
    assert run.timed_out
    assert not run.passed
    assert not run_tests("x = bytearray(2**30)", "", 20, 256 * MIB).passed


def test_no_network_and_nothing_written_elsewhere(tmp_path):
    target = tmp_path / "file"
    target.write_text("kept")
    code = f"""
import os, socket
assert not [k for k in os.environ if "TOKEN" in k or "KEY" in k]
def refused(work):
    try:
        work()
    except OSError:
        return True
    return False
open("here.txt", "w").write("x")
assert refused(lambda: open({str(target)!r}, "w"))
assert refused(lambda: socket.create_connection(("1.1.1.1", 53), timeout=2))
assert refused(lambda: os.remove({str(target)!r}))
"""
    run = run_tests(code, "", 20, 512 * MIB)
    if run.isolation != "all":
        assert not isolated()
        pytest.skip("this system allows no user namespaces")
    assert run.passed
    assert target.read_text() == "kept"


def test_code_is_the_last_block():
    assert code_in("text ```python\nx = 1\n``` more ```\ny = 2\n``` end") == "y = 2"
    assert code_in("x = 1") == "x = 1"
    assert code_in("cut ```python\nx = 1\ny") == "x = 1\ny"
    assert joined_tests(["assert a", "assert b"]) == "assert a\nassert b"


def test_the_reward_reports_how_the_code_is_isolated():
    from types import SimpleNamespace

    notes = []
    reward = UnitTests("tests", 20.0, 512, notes.append)
    rows = [SimpleNamespace(text=ADD, fields={"tests": t}) for t in ("assert add(1, 1) == 2", "")]
    assert reward(rows) == [1.0, None]
    assert reward(rows) == [1.0, None]
    assert len(notes) == 1
    assert "sampled code" in notes[0].lower()
