"""QLoRA of mixtures of experts with adapters on all experts: tokens/s and memory, M1 to M5.

    python benchmarks/moe.py M1 M2 M3 M4 M5 --out benchmarks/results/moe_h200.json
    python benchmarks/moe.py --tiny

Random weights at the published shapes, 4 micro-batches of 4 rows of 2,048 tokens, rank 16, the
trainer of a real run. The memory of M2 to M5 is that of the complete process (`memory_limit`); M3's
experts are streamed from host memory. `must` and `aim` are tokens/s. Each job runs in a process of
its own. `--tiny`: all jobs with a tiny mixture, on any machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from lorakit.bench import run_bench

JOBS = {
    "M1": {"shape": "qwen3-30b-a3b", "memory": None, "must": 11_000, "aim": 18_000},
    "M2": {"shape": "qwen3-30b-a3b", "memory": "24GiB", "must": 7_000, "aim": 12_000},
    "M3": {"shape": "qwen3-30b-a3b", "memory": "12GiB", "must": 5_000, "aim": 9_000},
    "M4": {"shape": "gpt-oss-20b", "memory": "16GiB", "must": 8_000, "aim": 14_000},
    "M5": {"shape": "gemma-4-26b-a4b", "memory": "24GiB", "must": 5_000, "aim": 9_000},
}


def measure(name, options):
    """Run one job in this process."""
    job = JOBS[name]
    overrides = [
        "expert_adapters=all",
        "lora_r=16",
        "lora_alpha=32",
        f"lora_dropout={options.dropout}",
        *options.set,
    ]
    if job["memory"] and not options.tiny:
        overrides.append(f"memory_limit={job['memory']}")
    if options.tiny and name == "M3":
        overrides.append("weight_offload=on")
    shape, seq = ("tiny-moe", 64) if options.tiny else (job["shape"], options.seq)
    result = run_bench(
        shape, "qlora", seq, 4, 4, options.steps, overrides, name, Console(stderr=True)
    )
    return {**{key: job[key] for key in ("memory", "must", "aim")}, **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", help="M1 to M5; default all")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--set", action="append", default=[], help="a recipe key, as key=value")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.jobs or list(JOBS)
    if unknown := [name for name in names if name not in JOBS]:
        parser.error(f"unknown job {unknown[0]}, expected some of {', '.join(JOBS)}")
    if len(names) == 1:
        results = [measure(names[0], options)]
    else:
        more = [argument for argument in sys.argv[1:] if argument not in JOBS]
        if "--out" in more:
            position = more.index("--out")
            del more[position : position + 2]
        results = []
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, name, *more], stdout=subprocess.PIPE, text=True
            )
            failed = {"id": name, "failed": done.returncode}
            results += json.loads(done.stdout) if done.returncode == 0 else [failed]
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
