"""Measure `lorakit ui`: pages of 200 runs, 100,000-step curves, idle CPU, 5,000 odd requests.

python benchmarks/ui_pages.py --output benchmarks/results/ui_pages.json
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.web.conftest import write_run  # noqa: E402
from tests.web.fuzz import fuzz  # noqa: E402

IDLE_SECONDS = 20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ui-"))
    try:
        result = {
            **measured_pages(folder, given.runs, given.steps),
            **fuzzed(folder, given.requests),
        }
    finally:
        shutil.rmtree(folder)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": psutil.cpu_count(),
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


def measured_pages(folder, runs, steps):
    first = write_run(folder / "runs" / "run-000", steps=500)
    for number in range(1, runs):
        shutil.copytree(first, folder / "runs" / f"run-{number:03d}")
    write_run(folder / "runs" / "long", steps=steps)
    words = [sys.executable, "-m", "lorakit", "ui", str(folder), "--port", "0", "--framed"]
    begin = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[1]
        started = time.perf_counter() - begin
        found = {"runs": runs, "steps": steps, "start_seconds": round(started, 2)}
        for name, path in (
            ("first_page", ""), ("list_again", "?part=1"), ("long_run", "run?name=runs/long"),
            ("long_curves", "run-curves?name=runs/long"),
        ):  # fmt: skip
            begin = time.perf_counter()
            with urllib.request.urlopen(address + path, timeout=120) as answer:
                found[f"{name}_bytes"] = len(answer.read())
            found[f"{name}_seconds"] = round(time.perf_counter() - begin, 3)
        server = psutil.Process(process.pid)
        # Idle: no page is open; then with a list that asks every 5 s, as an open page does.
        for name, every in (("idle", None), ("open_list", 5)):
            before, begin = server.cpu_times(), time.perf_counter()
            while time.perf_counter() - begin < IDLE_SECONDS:
                time.sleep(every or IDLE_SECONDS)
                if every:
                    urllib.request.urlopen(address + "?part=1", timeout=60).read()
            after = server.cpu_times()
            used = sum(after[:2]) - sum(before[:2])
            found[f"{name}_cpu_percent"] = round(100 * used / (time.perf_counter() - begin), 2)
        found["memory_mb"] = round(server.memory_info().rss / 1e6)
        process.terminate()
    return found


def fuzzed(folder, requests):
    secret = folder.parent / f"{folder.name}-secret.txt"
    secret.write_text("the-secret-text")
    odd = folder / "odd"
    write_run(odd / "runs" / "good")
    write_run(odd / "runs" / "half", total=20, finished=False)
    try:
        found = fuzz(odd, secret, requests, seed=7)
    finally:
        secret.unlink()
    return {
        "fuzzed": found["requests"],
        "statuses": found["statuses"],
        "faults": found["faults"][:20],
    }


if __name__ == "__main__":
    main()
