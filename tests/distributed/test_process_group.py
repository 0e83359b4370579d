"""A process finds its place among those that torchrun started, and what is wrong is named."""

import os
import subprocess
import sys

import pytest

from lorakit.distributed import launch_env
from lorakit.distributed.launch_env import REQUIRED, prepare_rank
from lorakit.distributed.process_group import SINGLE_PROCESS, check_members, init_distributed
from lorakit.distributed.rank_watch import Member
from lorakit.errors import WorkError


@pytest.fixture
def environment(monkeypatch):
    for name in (*REQUIRED, launch_env._SHOWN, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_process_by_itself_is_alone(environment):
    with init_distributed() as ranks:
        assert ranks is SINGLE_PROCESS
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.run_on_main_and_broadcast(lambda: 7) == 7
    assert SINGLE_PROCESS.all_gather_object("x") == ["x"]


@pytest.mark.parametrize(
    ("shown", "local", "then"),
    [(None, "1", "1"), ("4,6", "1", "6"), ("4,6", "2", ""), ("6", "1", "6"), ("", "1", "")],
)
def test_each_rank_sees_its_own_gpu(environment, shown, local, then):
    environment(RANK=local, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    environment(LOCAL_RANK=local, LOCAL_WORLD_SIZE="2")
    if shown is not None:
        environment(CUDA_VISIBLE_DEVICES=shown)
    prepare_rank()
    prepare_rank()  # a second call changes nothing
    assert os.environ["CUDA_VISIBLE_DEVICES"] == then


def test_one_process_of_torchrun_is_alone_for_the_libraries_too(environment):
    environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    with init_distributed() as ranks:
        assert ranks is SINGLE_PROCESS
        assert "LOCAL_RANK" not in os.environ
    assert os.environ["LOCAL_RANK"] == "0"


def test_one_process_keeps_the_gpus_it_sees(environment):
    prepare_rank()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_rank_without_a_gpu_among_others_with_one_is_named():
    members = [Member(0, "cuda:0", "a", "", 1), Member(1, "cpu:1", "a", "", 2)]
    with pytest.raises(WorkError, match=r"no CUDA GPU for rank 1 \(cpu:1 on a, process 2\)"):
        check_members(members)
    check_members(members[:1])


def test_a_rank_with_other_versions_is_named():
    members = [Member(n, f"cuda:{n}", "a", "", n, f"torch 2.{n}") for n in (1, 2)]
    with pytest.raises(WorkError, match=r"rank 2 .* has torch 2.2; rank 0 has torch 2.1"):
        check_members(members)


TWO = """
import os, time, torch
from lorakit.distributed.process_group import init_distributed

with init_distributed() as ranks:
    import accelerate
    assert accelerate.PartialState().num_processes == 2
    number = torch.tensor([1.0 + ranks.rank])
    ranks.all_reduce_(number)
    assert number.item() == 3
    assert ranks.all_gather_object(ranks.rank) == [0, 1]
    assert ranks.run_on_main_and_broadcast(lambda: "only rank 0 works" if ranks.is_main else 1 / 0)
    seen = []
    with ranks.main_process_first():
        time.sleep(0.3 if ranks.is_main else 0)
        seen.append(time.time())
    first, second = ranks.all_gather_object(seen[0])
    assert first <= second
with init_distributed() as again:
    assert again.all_gather_object(again.rank) == [0, 1]
print("well", ranks.rank, ranks.nodes, flush=True)
with init_distributed() as ranks:
    if ranks.rank == 1:
        raise SystemExit("the reason")
    ranks.all_gather_object(1)
"""


def test_two_processes_meet_add_and_wait_and_one_that_fails_ends_the_other(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    words = ["--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("well") == 2, done.stderr
    assert done.returncode != 0
    assert "the reason" in done.stderr
    assert "error: rank" not in done.stderr
