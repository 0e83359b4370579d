"""A rank that dies, hangs or fails ends the others, and is named by one of them alone."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.rank_ports import free_port

from lorakit.distributed import rank_watch
from lorakit.distributed.rank_watch import Member, RankWatch


class Store:
    """The launcher's store, of this process alone."""

    def __init__(self):
        self.values = {}

    def check(self, names):
        return all(name in self.values for name in names)

    def set(self, name, value):
        self.values[name] = value

    def add(self, name, count):
        self.values[name] = self.values.get(name, 0) + count
        return self.values[name]


class Ended(Exception):
    pass


class Watch(RankWatch):
    """One that says how it would end instead of ending."""

    def _abort(self, message):
        raise Ended(message)


def watch(rank=0, store=None, hosts=("box", "box", "box"), pids=(1, 2, 3)):
    members = [
        Member(n, f"cuda:{n}", host, "pid:[1]", pid)
        for n, (host, pid) in enumerate(zip(hosts, pids, strict=True))
    ]
    made = Watch(members, rank, None, store or Store())
    made.step, made.folder = 118, Path("runs/x")
    made.checkpoint_summary = lambda: "step_000100 is the last checkpoint"
    return made


def gone():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def end(made, error):
    with pytest.raises(Ended) as caught:
        made._judge(error)
    return str(caught.value)


def test_rank_0_names_those_that_missed_the_barrier_with_the_way_to_continue():
    error = "[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 30000 ms"
    said = end(watch(pids=(1, gone(), gone())), error)
    assert said.startswith("error: rank 1 (cuda:1 on box, process ")
    assert "error: rank 2 (cuda:2 on box, process " in said
    assert said.count("ended without an error message, after step 118") == 2
    assert "step_000100 is the last checkpoint" in said
    assert said.endswith("resume with: lorakit train runs/x/recipe.yaml --resume --gpus 3")


def test_a_stopped_rank_of_this_machine_is_ended(monkeypatch):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    made = watch(pids=(1, sleeper.pid, 3))
    said = end(made, "Rank 1 failed to pass monitoredBarrier in 5 ms")
    assert "has not answered for 30 s" in said
    assert sleeper.poll() is None  # the reason is printed first
    made._kill_stopped()
    assert sleeper.wait(60) == -9


def test_ranks_of_several_machines_are_known_as_such():
    made = watch(hosts=("a", "a", "b"), pids=(1, 2, os.getpid()))
    said = end(made, "Ranks 2 failed to pass monitoredBarrier in 30000 ms")
    assert "rank 2 (cuda:2 on b, process" in said
    assert "has ended or does not answer" in said
    assert "on every machine, with --resume" in said
    made.folder = None
    assert end(watch(hosts=("a", "a", "b")), "Ranks 2 failed to pass x").count("error:") == 1
    assert made.message(made.members[2:], "").endswith("start the same command again")


def test_the_others_name_rank_0_once_and_only_if_it_said_nothing(monkeypatch):
    monkeypatch.setattr(rank_watch, "GRACE_SECONDS", 0.0)
    store = Store()
    error = "Rank 2 successfully reached monitoredBarrier, but received errors"
    assert "rank 0 (cuda:0" in end(watch(2, store, pids=(gone(), 2, 3)), error)
    assert end(watch(1, store, pids=(gone(), 2, 3)), error) == ""


def test_one_that_fails_speaks_for_itself():
    store = Store()
    store.set("failed", "")
    assert end(watch(store=store), "Ranks 1 failed to pass monitoredBarrier in 30000 ms") == ""


SCRIPT = """
    import json, os, signal, sys, time
    import torch.distributed
    import accelerate
    from lorakit.distributed import process_group, rank_watch
    from lorakit.distributed.process_group import init_distributed
    from datetime import timedelta

    rank_watch.SILENT, process_group.LOST_SECONDS = timedelta(seconds=4), 6.0

    def run(rank, fault, port, folder):
        os.environ.update({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "",
        })
        said = os.open(f"{folder}/{fault}_{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        with init_distributed() as ranks:
            ranks.at(7, lambda: "kept", None)
            ranks.all_gather_object(rank)
            victim = int(fault[-1])
            if rank == victim and fault.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == victim and fault.startswith("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if rank == victim and fault.startswith("fail"):
                sys.exit("the reason")
            if not fault.startswith("well"):
                ranks.all_gather_object(rank)
            time.sleep(2 if rank == 1 else 0)
            print("well")

    children = {}
    faults = ("kill1", "kill0", "stop0", "fail2", "fail0", "well0")
    for fault, port in zip(faults, sys.argv[2:], strict=True):
        for rank in range(3):
            child = os.fork()
            if not child:
                try:
                    run(rank, fault, port, sys.argv[1])
                    import atexit
                    atexit._run_exitfuncs()
                    code = 0
                except SystemExit:
                    print("the reason", flush=True)
                    code = 1
                except BaseException as error:
                    print("UNEXPECTED", repr(error), flush=True)
                    code = 99
                os._exit(code)
            children[child] = (fault, rank)
    codes = {}
    while len(codes) < len(children):
        child, status = os.waitpid(-1, 0)
        fault, rank = children[child]
        codes[f"{fault}_{rank}"] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Three ranks under each fault: {name: (exit code, output)}."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [
            sys.executable,
            str(folder / "ranks.py"),
            str(folder),
            *(str(free_port()) for _ in "123456"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {n: (codes[n], (folder / f"{n}.txt").read_text()) for n in codes}


@pytest.mark.parametrize(
    ("fault", "victim", "words"),
    [
        ("kill1", 1, "ended without an error message"),
        ("kill0", 0, "ended without an error message"),
        ("stop0", 0, "has not answered"),
    ],
)
def test_a_lost_rank_is_named_by_one_of_the_others(faults, fault, victim, words):
    assert faults[f"{fault}_{victim}"][0] == -9
    others = [faults[f"{fault}_{rank}"] for rank in range(3) if rank != victim]
    assert [code for code, _ in others] == [1, 1]
    said = "".join(text for _, text in others)
    assert said.count("error: ") == 1, said
    assert f"error: rank {victim} (cpu:{victim} on" in said
    assert words in said
    assert "after step 7" in said


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_fails_ends_the_others_without_words(faults, victim):
    ended = [faults[f"fail{victim}_{rank}"] for rank in range(3)]
    assert [code for code, _ in ended] == [1, 1, 1]
    assert "the reason" in ended[victim][1]
    assert "error: " not in "".join(said for _, said in ended)


def test_ranks_that_are_well_end_together_though_one_is_late(faults):
    assert [faults[f"well0_{rank}"][0] for rank in range(3)] == [0, 0, 0]
    assert all(faults[f"well0_{rank}"][1].endswith("well\n") for rank in range(3))
