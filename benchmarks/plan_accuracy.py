"""Predicted against measured peak memory, one process a row: `python benchmarks/plan_accuracy.py`.

    python benchmarks/plan_accuracy.py --device cuda --output benchmarks/results/plan_cuda.json

On a card the figure is the driver's for the whole process; on a CPU it is VmHWM, the most RAM the
process ever held. Weights are random, steps go through the trainer of a real run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

# shape, method, tokens a row, micro-batch, accumulation, settings
CPU = [
    ("tiny", "lora", 64, 2, 2, []),
    ("smollm2-135m", "lora", 128, 1, 2, []),
    ("smollm2-135m", "lora", 512, 2, 1, []),
    ("smollm2-135m", "lora", 512, 4, 1, []),
    ("smollm2-135m", "lora", 1024, 2, 1, ["gradient_checkpointing=true"]),
    ("smollm2-135m", "lora", 256, 2, 1, ["dtype=float32"]),
    ("smollm2-135m", "qlora", 256, 2, 1, []),
    ("smollm2-135m", "qlora", 512, 4, 1, ["gradient_checkpointing=true"]),
    ("qwen3-0.6b", "lora", 128, 1, 1, []),
    ("llama-3.2-1b", "lora", 256, 1, 1, ["lora_r=8"]),
    ("llama-3.2-1b", "qlora", 128, 1, 1, ["lora_r=8"]),
]
CUDA = [
    ("llama-2-7b", "lora", 2048, 1, 8, []),
    ("llama-2-7b", "lora", 2048, 4, 2, ["gradient_checkpointing=true"]),
    ("llama-2-7b", "lora", 2048, 1, 8, ["memory_limit=4GiB", "weight_offload=on"]),
    ("llama-2-7b", "qlora", 2048, 4, 4, []),
    ("llama-2-7b", "qlora", 2048, 4, 4, ["memory_limit=12GiB"]),
    ("llama-2-7b", "qlora", 2048, 4, 4, ["memory_limit=6GiB"]),
    ("llama-2-7b", "qlora", 2048, 4, 4, ["memory_limit=3GiB", "weight_offload=on"]),
    ("llama-2-7b", "qlora", 512, 1, 4, ["optimizer=paged_adamw_8bit"]),
    ("llama-2-7b", "lora", 2048, 1, 4, ["fused_layers=off", "gradient_checkpointing=true"]),
    ("llama-3.1-8b", "lora", 2048, 1, 8, []),
    ("llama-3.1-8b", "qlora", 16384, 1, 1, ["lora_r=32", "gradient_checkpointing=true"]),
    ("qwen3-8b", "lora", 2048, 1, 8, ["lora_r=64"]),
    ("qwen3-8b", "qlora", 2048, 4, 4, []),
    ("mistral-7b", "lora", 4096, 2, 2, ["memory_limit=30GiB"]),
]


def one(row, steps):
    """Run one row in this process; returns what was planned and what was measured."""
    shape, method, seq, micro, accumulation, sets = row
    from rich.console import Console

    from lorakit.bench import run_bench

    began = time.perf_counter()
    quiet = Console(quiet=True)
    result = run_bench(shape, method, seq, micro, accumulation, steps, sets, None, quiet)
    on_gpu = result["device"] == "cuda"
    measured = result["peak_process_gib" if on_gpu else "peak_host_gib"]
    kept = ("gpu", "plan", "planned_gib", "planned_parts", "tokens_per_second", "layers")
    return {
        "row": " ".join([shape, method, f"{micro} x {accumulation} x {seq}", *sets]),
        "measured_gib": round(measured, 3),
        "error": round(result["planned_gib"] / measured - 1, 4),
        "allocated_gib": result["peak_allocated_gib"],
        **{key: result[key] for key in kept},
        "seconds": round(time.perf_counter() - began, 1),
    }


def child(number, device, steps, limit):
    """Row `number` in a process of its own; a row that fails is a result too."""
    words = [sys.executable, __file__, "--device", device, "--row", str(number)]
    try:
        done = subprocess.run(
            [*words, "--steps", str(steps)], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"row": str(number), "failed": f"took over {limit} s"}
    if done.returncode:
        return {"row": str(number), "failed": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    words.add_argument("--output", type=Path)
    words.add_argument("--steps", type=int, default=2)
    words.add_argument("--limit", type=int, default=120, help="seconds a row may take")
    words.add_argument("--row", type=int, help="run this row alone, in this process")
    asked = words.parse_args()
    rows = CUDA if asked.device == "cuda" else CPU
    if asked.row is not None:
        print(json.dumps(one(rows[asked.row], asked.steps)))
        return
    results = []
    for number in range(len(rows)):
        found = child(number, asked.device, asked.steps, asked.limit)
        results.append(found)
        write(asked, results)
        if "failed" in found:
            print(f"{rows[number]!s:78} {found['failed']}", flush=True)
            continue
        print(
            f"{found['row']:78} planned {found['planned_gib']:7.3f}  measured "
            f"{found['measured_gib']:7.3f} GiB  error {found['error']:+7.1%}  {found['seconds']} s",
            flush=True,
        )
    found = summary(results)
    if not found:
        sys.exit("no row came to its end")
    print(", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in found.items()))


def summary(results):
    """Median and worst error of the rows that came to their end."""
    errors = [abs(r["error"]) for r in results if "error" in r]
    if not errors:
        return {}
    return {"median_error": statistics.median(errors), "worst_error": max(errors)}


def write(asked, results):
    """The result so far: a run that is cut off keeps its rows."""
    if asked.output:
        from lorakit.bench import provenance
        from lorakit.hardware import detect_device
        from lorakit.storage.run_dir import write_json

        command = f"python benchmarks/plan_accuracy.py --device {asked.device}"
        value = {**summary(results), "rows": results, **provenance(detect_device(), command)}
        write_json(asked.output, value)


if __name__ == "__main__":
    main()
