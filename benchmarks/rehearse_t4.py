"""The QLoRA notebook's recipe on a newer card that is held to what a T4 can do, one process a row.

    python benchmarks/rehearse_t4.py --output benchmarks/results/rehearse_t4.json

float16, 13.87 GiB of memory, no matrix product in a Triton kernel, no FlashAttention: the code that
a T4 runs, with the fast layers and with the model's own (PEFT's). The card multiplies far faster
than a T4 does: of the rates only their ratio may say something of a T4, of the memory all.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

ROWS = list(itertools.product(("fixed", "mixed"), ("auto", "off")))  # lengths, engine
SETTINGS = ["dtype=float16", "memory_limit=13.87GiB"]


def as_t4():
    """Hold this process to what the code does on a T4."""
    from lorakit.ops import backend

    backend.MATRIX_KERNELS_FROM = (99, 0)
    flash(False)


def flash(there):
    """Whether attention may take FlashAttention or cuDNN."""
    import torch

    torch.backends.cuda.enable_flash_sdp(there)
    torch.backends.cuda.enable_cudnn_sdp(there)


def one(lengths, engine, steps):
    """Run one row in this process."""
    from rich.console import Console

    from lorakit import bench

    as_t4()
    plan = bench.plan_training

    def planned(*asked):
        # The plan chooses its attention by these flags, which are on on a T4 too.
        flash(True)
        try:
            return plan(*asked)
        finally:
            flash(False)

    bench.plan_training = planned
    sets = [*SETTINGS, f"fused_layers={engine}"]
    quiet = Console(quiet=True)
    result = bench.run_bench(
        "llama-2-7b", "qlora", 2048, None, None, steps, sets, None, quiet, lengths=lengths
    )
    kept = ("gpu", "layers", "plan", "planned_gib", "peak_process_gib", "tokens_per_second")
    return {"lengths": lengths, "engine": engine, **{key: result[key] for key in kept}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--row", type=int)
    asked = parser.parse_args()
    if asked.row is not None:
        print(json.dumps(one(*ROWS[asked.row], asked.steps)))
        return

    from lorakit.bench import provenance
    from lorakit.hardware import detect_device

    rows = []
    for number in range(len(ROWS)):
        command = [sys.executable, __file__, "--row", str(number), "--steps", str(asked.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    command = f"python benchmarks/rehearse_t4.py --steps {asked.steps}"
    result = {"rows": rows, "settings": SETTINGS, **provenance(detect_device("auto"), command)}
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
