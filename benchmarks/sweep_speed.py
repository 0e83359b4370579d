"""Several adapters by one sweep against the same runs one after the other.

    python benchmarks/sweep_speed.py --out benchmarks/results/sweep_cpu.json
    python benchmarks/sweep_speed.py --shape qwen3-0.6b --adapters 8 --out ...     on a GPU
    python benchmarks/sweep_speed.py --shape llama-2-7b --adapters 8 --out ...

Every measurement is a process of its own, imports included. Without --shape it is the demo; with
one, a random model of that shape is written first. `times_one_run` is the time of the sweep over
that of one `lorakit train`; the adapter of each run is compared with the same run alone, as far as
it was trained alone (--alone).
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir, read_metrics

RATES = (2e-3, 1e-3, 5e-4, 2.5e-4, 3e-3, 1.5e-3, 7e-4, 4e-4)


def write_model(shape, folder):
    """A model of this shape with random weights, and the demo's tokenizer."""
    from lorakit.model.demo_model import demo_model_dir
    from lorakit.model.random_init import random_model
    from lorakit.planning.known_models import shape_config

    random_model(shape_config(shape), detect_device(), False).save_pretrained(folder)
    for path in Path(demo_model_dir()).iterdir():
        if path.name.startswith(("tokenizer", "special", "vocab", "merges", "chat")):
            shutil.copy(path, folder)


def write_rows(path, count=256):
    text = "The quick brown fox jumps over the lazy dog and reads a book about the sea. " * 12
    rows = [
        {"question": f"Number {i}?", "answer": text[: 300 + 7 * (i % 90)]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(*words):
    """(seconds, seconds of processor time) of one command; other programs change only the first."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "lorakit", *map(str, words)], capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(time.perf_counter() - began, 1), round(used, 1)


def memory_of(folder):
    """(measured GB, planned GB) of a run."""
    run = RunDir(folder)
    plan = json.loads(run.plan.read_text())
    used = max(row["memory_gb"] for row in read_metrics(run))
    return used, round(plan["total_bytes"] / 1e9, 2)


def adapter(folder):
    return (folder / "adapter" / ADAPTER_WEIGHTS).read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--alone", type=int, default=1, help="runs to train alone, too")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        common = [f"--set={pair}" for pair in given.settings]
        if given.shape:
            write_model(given.shape, folder / "model")
            write_rows(folder / "rows.jsonl")
            common += ["--model", folder / "model", "--data", folder / "rows.jsonl"]
            common += ["max_steps=40", "val_size=16"]
        else:
            import lorakit

            common.insert(0, Path(lorakit.__file__).parent / "assets" / "demo.yaml")
        rates = RATES[: given.adapters]
        alone = []
        for number, rate in enumerate(rates[: given.alone]):
            words = ["--output", folder / f"alone{number}", f"learning_rate={rate}"]
            alone.append(timed("train", *common, *words))
        vary = ["--vary", f"learning_rate={','.join(map(str, rates))}"]
        full = timed("sweep", *common, *vary, "--output", folder / "full")
        halved = timed("sweep", *common, *vary, "--output", folder / "halved", "--halving")
        runs = json.loads((folder / "full" / "sweep.json").read_text())["runs"]
        one, one_used = (sum(times) / len(alone) for times in zip(*alone, strict=True))
        result = {
            "shape": given.shape or "demo",
            "adapters": given.adapters,
            "one_run_seconds_and_processor": alone,
            "sweep_seconds_and_processor": full,
            "halving_seconds_and_processor": halved,
            "times_one_run": round(full[0] / one, 2),
            "times_one_run_processor": round(full[1] / one_used, 2),
            "halving_times_one_run": round(halved[0] / one, 2),
            "halving_times_one_run_processor": round(halved[1] / one_used, 2),
            "faster_than_one_by_one": round(given.adapters * one / full[0], 2),
            "equal_bits": [
                adapter(folder / f"alone{i}") == adapter(folder / "full" / runs[i]["name"])
                for i in range(len(alone))
            ],
            "memory_gb_measured_planned": [
                memory_of(folder / "full" / run["name"]) for run in runs
            ],
            **provenance(detect_device(), shlex.join(["python", *sys.argv])),
        }
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
