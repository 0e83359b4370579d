"""One writer a run: the second is told who holds it, and a killed one holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from lorakit.errors import RunError, WorkError
from lorakit.storage.run_dir import RunDir
from lorakit.storage.run_lock import LOCK, lock_owner, only_writer

HOLD = """
import sys
from pathlib import Path
from lorakit.storage.run_lock import only_writer
from lorakit.storage.run_dir import RunDir
with only_writer(RunDir(Path(sys.argv[1])), print):
    print("held", flush=True)
    sys.stdin.read()  # until it is killed
"""

COUNT = """
import sys, time
from pathlib import Path
from lorakit.errors import RunError
from lorakit.storage.run_lock import only_writer
from lorakit.storage.run_dir import RunDir
counter, left = Path(sys.argv[2]), 20
while left:
    try:
        with only_writer(RunDir(Path(sys.argv[1])), print):
            number = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(number + 1))
            left -= 1
    except RunError:
        time.sleep(0.001)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_first_ones_number_and_a_killed_one_frees(tmp_path, holder):
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunError) as caught, only_writer(run, print):
        pass
    assert f"process {holder.pid}" in caught.value.message
    assert f"kill -INT {holder.pid}" in caught.value.hint
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run.path / LOCK).exists()  # stale: nobody holds it
    with only_writer(run, print):
        assert (run.path / LOCK).read_text() == f"{os.getpid()}\n"
    assert not run.path.exists() or not any(run.path.iterdir())


def test_a_folder_made_for_the_lock_goes_unless_something_was_written(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    with only_writer(run, print):
        assert run.path.is_dir()
    assert list(tmp_path.iterdir()) == []
    with only_writer(run, print):
        run.recipe.write_text("model: m\n")
    assert [p.name for p in run.path.iterdir()] == ["recipe.yaml"]


def test_within_one_process_too(tmp_path):
    run = RunDir(tmp_path / "a")
    with (
        only_writer(run, print),
        pytest.raises(RunError, match=f"process {os.getpid()}"),
        only_writer(run, print),
    ):
        pass


def test_many_at_once_one_wins_at_a_time(tmp_path):
    """Each holder counts up; a lost update would show. Names are removed while others lock."""
    counter = tmp_path / "count"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "run"), str(counter)]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [w.wait(300) for w in workers] == [0, 0, 0]
    assert counter.read_text() == "60"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WorkError, match="cannot write"),
        only_writer(RunDir(tmp_path / "file"), print),
    ):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import errno
    import fcntl

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    with only_writer(RunDir(tmp_path / "a"), said.append):
        pass
    assert "this file system has no locks" in said[0]


def test_only_a_process_that_holds_the_lock_owns_it(tmp_path):
    """The number in a lock file may be anyone's."""
    lock = tmp_path / LOCK
    assert lock_owner(tmp_path) is None
    for text in ("", "x", "-1", "9" * 30, "\0", f"{os.getpid()}\n"):
        lock.write_text(text)
        assert lock_owner(tmp_path) is None
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert lock_owner(tmp_path) == holder.pid
        holder.kill()
    assert lock_owner(tmp_path) is None
