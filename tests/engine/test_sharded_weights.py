"""A part of the bytes on each rank, the whole again where it is gathered."""

import os
import subprocess
import sys
import textwrap

import torch

from lorakit.engine.weight_streaming import nan_placeholder


def test_what_reads_a_weight_that_no_rank_holds_gets_nan():
    weight = nan_placeholder(torch.ones(3, 4, dtype=torch.bfloat16))
    assert weight.shape == (3, 4)
    assert weight.isnan().all()
    packed = nan_placeholder(torch.ones(8, 1, dtype=torch.uint8))
    assert packed.shape == (8, 1)
    assert packed.dtype == torch.uint8


def test_three_ranks_hold_a_third_each_and_gather_all(tmp_path):
    """Forked, so that torch is imported once."""
    code = """
        import os, sys, torch, torch.distributed as dist
        from lorakit.engine.weight_streaming import Shard
        from lorakit.distributed.process_group import DistributedContext

        def work(rank):
            store = dist.FileStore(sys.argv[1], 3)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
            ranks = DistributedContext(rank, 3, 3)
            ranks.node_group = dist.group.WORLD
            whole = torch.arange(252, dtype=torch.uint8)
            shard = Shard(whole, ranks, torch.device("cpu"))
            assert shard.bytes.tolist() == list(range(84 * rank, 84 * rank + 84))
            place = torch.zeros(shard.size, dtype=torch.uint8)
            shard.fill(place)
            assert torch.equal(place, whole)
            dist.barrier()
            dist.destroy_process_group()

        children = []
        for rank in range(3):
            child = os.fork()
            if not child:
                code = 1
                try:
                    work(rank)
                    code = 0
                finally:
                    sys.excepthook(*sys.exc_info()) if code else None
                    os._exit(code)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert ends == [0, 0, 0], ends
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a pool of threads does not survive a fork
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
