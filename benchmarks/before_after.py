"""Speed and memory of two versions of the source, by turns on one GPU.

    git worktree add ../old COMMIT
    python benchmarks/before_after.py ../old/src src --rows P1 P2 --out result.json

Each row runs in a process of its own, the old version and the new one in alternation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MIXED = ["--micro-batch", "1", "--accumulation", "64", "--lengths", "mixed"]
STREAMED = ["--set", "memory_limit=4GiB", "--set", "weight_offload=on"]
ROWS = {
    "P1": ("lora", 9, []),
    "P2": ("lora", 7, ["--set", "memory_limit=14.75GiB"]),
    "P3": ("qlora", 6, []),
    "P4": ("qlora", 7, ["--set", "memory_limit=6GiB"]),
    "P5": ("lora", 6, MIXED),
    "P6": ("lora", 7, STREAMED),
}


def run(source, row, commit):
    method, steps, flags = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "lorakit", "bench", "--shape", "llama-2-7b"]
        command += ["--method", method, "--steps", str(steps), "--id", row, *flags]
        path = f"{Path(source).resolve()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        env = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [*command, "--output", str(output)], env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{row} of {source} failed:\n{done.stderr[-3000:]}")
        measured = json.loads(output.read_text())
    keep = ("tokens_per_second", "peak_process_gib", "step_seconds", "gpu", "versions", "date")
    found = {"row": row, "commit": commit} | {k: measured.get(k) for k in keep}
    print(
        row,
        commit,
        f"{found['tokens_per_second']:,.0f} tok/s {found['peak_process_gib']} GiB",
        flush=True,
    )
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--commits", nargs=2, default=["old", "new"])
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = list(zip((options.old, options.new), options.commits, strict=True))
    results = []
    for row in options.rows:
        for source, commit in versions:
            results.append(run(source, row, commit))
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
