"""A part of the bytes on each rank, the whole again where it is gathered."""

import subprocess
import sys
import textwrap

import torch

from lorakit.model.shard import nowhere


def test_what_reads_a_weight_that_no_rank_holds_gets_nan():
    weight = nowhere(torch.ones(3, 4, dtype=torch.bfloat16))
    assert weight.shape == (3, 4)
    assert weight.isnan().all()
    packed = nowhere(torch.ones(8, 1, dtype=torch.uint8))
    assert packed.shape == (8, 1)
    assert packed.dtype == torch.uint8


def test_three_ranks_hold_a_third_each_and_gather_all():
    code = """
        import torch, torch.multiprocessing as mp, torch.distributed as dist
        from lorakit.model.shard import Shard
        from lorakit.ranks import Ranks

        def work(rank, path):
            store = dist.FileStore(path, 3)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
            ranks = Ranks(rank, 3, 3)
            ranks.of_node = dist.group.WORLD
            whole = torch.arange(252, dtype=torch.uint8)
            shard = Shard(whole, ranks, torch.device("cpu"))
            assert shard.bytes.tolist() == list(range(84 * rank, 84 * rank + 84))
            place = torch.zeros(shard.size, dtype=torch.uint8)
            shard.fill(place)
            assert torch.equal(place, whole)
            total = torch.tensor([float(rank)])
            dist.all_reduce(total)
            assert ranks.nodes == 1

        if __name__ == "__main__":
            import sys
            mp.spawn(work, (sys.argv[1],), 3)
    """
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "three.py"
        script.write_text(textwrap.dedent(code))
        done = subprocess.run(
            [sys.executable, str(script), f"{folder}/store"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
