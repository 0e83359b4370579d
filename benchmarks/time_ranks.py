"""How fast the cards of a machine add up and gather bytes: what `plan --gpus` reckons with.

    torchrun --standalone --nproc-per-node 2 benchmarks/time_ranks.py --out time_ranks.json

An all-reduce of the float32 gradients of a 7B LoRA (40 million numbers) and an all-gather of one
layer's frozen weights in bfloat16 (202 million). Bus bandwidth as NCCL's tests define it:
2 (N-1)/N bytes/s of an all-reduce, (N-1)/N of an all-gather.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from lorakit.distributed.launch_env import prepare_rank

# What follows asks CUDA for its cards while it is imported: NCCL then found both ranks on one.
prepare_rank()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from lorakit.bench import provenance  # noqa: E402
from lorakit.hardware import detect_device  # noqa: E402

GRADIENTS = 39_976_960
LAYER = 202_375_168


def timed(work, device, times):
    """Median seconds, all ranks starting together."""
    found = []
    for number in range(times + 3):
        dist.barrier()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--share", type=float, default=1.0, help="of the sizes, to try it on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.device("cuda", 0) if device == "cuda" else None  # the only one this rank sees
    dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=own)
    gradients = torch.zeros(int(GRADIENTS * a.share), device=device)
    layer = torch.zeros(int(LAYER * a.share) // count * count, dtype=torch.bfloat16, device=device)
    part = layer[: len(layer) // count].clone()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduced = timed(lambda: dist.all_reduce(gradients), device, a.times)
    gathered = timed(lambda: gather(layer, part), device, a.times)
    if rank == 0:
        result = {
            "id": "time-ranks",
            "gpu": detect_device().name,
            "gpus": count,
            "all_reduce": {
                "bytes": gradients.nbytes,
                "seconds": reduced,
                "bus_gbs": round(2 * (count - 1) / count * gradients.nbytes / reduced / 1e9, 1),
            },
            "all_gather": {
                "bytes": layer.nbytes,
                "seconds": gathered,
                "bus_gbs": round((count - 1) / count * layer.nbytes / gathered / 1e9, 1),
            },
            **provenance(
                detect_device(),
                f"torchrun --standalone --nproc-per-node {count} benchmarks/time_ranks.py",
            ),
        }
        a.out.write_text(json.dumps(result, indent=2) + "\n")
        print({key: result[key] for key in ("gpu", "gpus", "all_reduce", "all_gather")})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
