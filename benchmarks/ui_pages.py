"""Measure `lorakit ui`: pages of 200 runs, 100,000-step curves, idle CPU, 5,000 odd requests, and
examples of a file of a million rows.

python benchmarks/ui_pages.py --output benchmarks/results/ui_pages.json
"""

import argparse
import json
import os
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
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only-rows", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ui-"))
    try:
        result = {} if given.only_rows else measured_pages(folder, given.runs, given.steps)
        if not given.only_rows:
            result |= fuzzed(folder, given.requests)
        result["data"] = measured_rows(folder / "data", given.rows)
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


def measured_rows(folder, rows):
    """Seconds until the first examples of a new file, then of other pages; memory of the worker."""
    folder.mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as handle:
        for i in range(rows):
            row = {"question": f"What is box {i} of shelf {i % 977}?", "answer": f"A {i * 7919}."}
            handle.write(json.dumps(row) + "\n")
    found = {"rows": rows, "file_mb": round((folder / "rows.jsonl").stat().st_size / 1e6)}
    words = [sys.executable, "-m", "lorakit", "ui", str(folder), "--port", "0", "--framed"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        data = process.stdout.readline().split()[1] + "data?model=demo&data="
        server, peak = psutil.Process(process.pid), 0
        for name, query, words_ in (
            ("demo", "demo", "1 to 10"),  # unpacks the model, imports torch
            ("first", "rows.jsonl", "1 to 10"), ("next", "rows.jsonl&offset=10", "11 to 20"),
            ("middle", f"rows.jsonl&offset={rows // 2}", f"{rows // 2 + 1:,} to"),
            ("search", f"rows.jsonl&find=box {rows - 3} of", "1 found"),
            ("row", f"rows.jsonl&find=rows.jsonl:{rows // 3}", "1 found"),
        ):  # fmt: skip
            begin, text = time.perf_counter(), ""
            while words_ not in text:
                with urllib.request.urlopen(
                    data + query.replace(" ", "%20"), timeout=120
                ) as answer:
                    text = answer.read().decode()
                assert 'class="fault"' not in text, text[-500:]
                children = server.children(recursive=True)
                peak = max([peak, *(child.memory_info().rss for child in children)])
            found[f"{name}_seconds"] = round(time.perf_counter() - begin, 2)
        found["worker_peak_mb"] = round(peak / 1e6)
        found["server_mb"] = round(server.memory_info().rss / 1e6)
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
