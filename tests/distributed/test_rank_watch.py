"""A rank that dies, hangs or fails ends the others, and is named by one of them alone."""

import datetime
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lorakit.distributed import heartbeat
from lorakit.distributed.heartbeat import Beat, Heartbeat, no_answer


@pytest.fixture
def store():
    wait = datetime.timedelta(seconds=10)
    return dist.TCPStore("127.0.0.1", 0, None, True, timeout=wait, wait_for_workers=False)


class Watch(Heartbeat):
    """One that says how it would end instead of ending."""

    def _abort(self, troubled, words):
        self.ended = [beat.rank for beat in troubled], words


def pair(store):
    """Rank 0, and rank 1 whose line is written by hand."""
    mine = Watch(store, 0, 2, "cuda:0")
    theirs = Watch(store, 1, 2, "cuda:1")
    mine.ended = None
    mine.own_beat.state = "ready"
    mine.set_step(118, lambda: "step_000100 is the last checkpoint", Path("runs/x"))
    return mine, theirs


def judged(mine):
    mine._check_peers(mine.read())
    return mine.ended


def test_who_beats_is_well(store):
    mine, theirs = pair(store)
    for _ in range(3):
        theirs.publish()
        assert judged(mine) is None


def test_a_silent_rank_is_named_with_its_last_step(store, monkeypatch):
    mine, theirs = pair(store)
    theirs.set_step(117, str)
    theirs.publish()
    assert judged(mine) is None
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.0)
    time.sleep(0.01)
    troubled, words = judged(mine)
    assert troubled == [1]
    assert f"rank 1 (cuda:1 on {theirs.own_beat.host}, process {os.getpid()})" in words
    assert "after step 117" in words
    assert "step_000100 is the last checkpoint" in words
    assert words.endswith("hint: resume with: lorakit train runs/x/recipe.yaml --resume --gpus 2")


def test_the_way_on_is_that_of_one_machine_or_several_or_of_a_run_not_begun(store):
    mine, theirs = pair(store)
    assert "on every machine, with --resume" in mine._failure_message(
        [theirs.own_beat], [], apart=True
    )
    mine.folder = None
    assert mine._failure_message([theirs.own_beat], [], apart=False).endswith(
        "start the same command again"
    )


def test_ranks_of_several_machines_are_known_as_such(store, monkeypatch):
    mine, theirs = pair(store)
    theirs.own_beat.host = "another"
    theirs.publish()
    assert judged(mine) is None
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.0)
    time.sleep(0.01)
    assert "on every machine" in judged(mine)[1]


def test_a_process_that_is_gone_is_named_at_once_and_only_on_its_own_machine(store):
    mine, theirs = pair(store)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    theirs.own_beat.pid = gone.pid
    theirs.own_beat.host = "another"
    theirs.publish()
    assert judged(mine) is None
    theirs.own_beat.host = mine.own_beat.host
    theirs.publish()
    assert judged(mine)[1].startswith("error: rank 1")
    assert "ended without an error message" in mine.ended[1]


def test_one_that_failed_speaks_for_itself_and_one_that_left_is_no_fault(store, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.0)
    mine, theirs = pair(store)
    theirs.shutdown("left")
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.0)
    assert judged(mine) is None
    theirs.shutdown("failed")
    assert judged(mine) == ([], "")


def test_an_all_reduce_without_an_answer_names_who_still_waits(store, monkeypatch):
    monkeypatch.setattr(heartbeat, "PREFLIGHT_SECONDS", 0.0)
    mine, theirs = pair(store)
    mine.own_beat.state = "preflight"
    mine.publish()
    time.sleep(0.01)
    _, words = judged(mine)
    assert "rank 0 (cuda:0" in words
    assert "rank 1 (cuda:1" in words
    assert "NCCL_P2P_DISABLE" in no_answer([theirs.own_beat])


def test_the_process_ends_though_its_main_thread_hangs(tmp_path):
    code = f"""
        import threading, torch.distributed as dist
        from pathlib import Path
        from lorakit.distributed import heartbeat
        heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS, heartbeat.GRACE_SECONDS = 0.05, 3.0, 0.0
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        other = heartbeat.Heartbeat(store, 1, 2, "cpu:1")
        other.own_beat.host = "elsewhere"
        other.publish()
        mine = heartbeat.Heartbeat(store, 0, 2, "cpu:0")
        mine.own_beat.state = "ready"
        mine.set_step(3, lambda: "kept", Path({str(tmp_path)!r}))
        mine.start()
        threading.Event().wait()  # where the main thread hangs
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "rank 1 (cpu:1 on elsewhere" in done.stderr
    stacks = (tmp_path / "stacks_rank0.txt").read_text()
    assert 'File "<string>"' in stacks  # the main thread, in the program above
    assert "heartbeat.py" in stacks
    assert f"stacks of each process: {tmp_path}/stacks_rank*.txt" in done.stderr


def test_without_its_launcher_a_process_saves_and_stops(store, monkeypatch):
    mine, _ = pair(store)
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    mine._without_launcher()
    mine._without_launcher()
    assert sent == [(os.getpid(), 15)]


def test_a_beat_says_who_and_where():
    assert str(Beat(3, 42, "box", "", "cuda:1")) == "rank 3 (cuda:1 on box, process 42)"
