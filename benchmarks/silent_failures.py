"""Take each check against a silent failure out of the source, and see its test turn red.

    python benchmarks/silent_failures.py --out benchmarks/results/silent_failures.json

The table is tests/silent_failures.py. The source is copied; nothing here is changed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def outcome(test, source):
    """(passed, last words) of one test on this source."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode == 0, failed[0].strip("E ") if failed else ""


def kept(path):
    """Rows of an earlier result by class, each with the commit it was made at."""
    result = json.loads(path.read_text()) if path and path.exists() else {"rows": []}
    return {r["class"]: {"commit": result["commit"], **r} for r in result["rows"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a class's name; keeps other rows")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = ROOT / "tests" / "silent_failures.py"
    spec = importlib.util.spec_from_file_location("silent_failures", path)
    table = sys.modules["silent_failures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    from lorakit.bench import commit, provenance
    from lorakit.hardware import detect_device

    rows, began, green = kept(args.out) if args.only else {}, time.perf_counter(), {}
    for one in (c for c in table.CLASSES if args.only in c.name):
        if one.test not in green:
            green[one.test] = outcome(one.test, ROOT / "src")[0]
        with tempfile.TemporaryDirectory() as name:
            shutil.copytree(ROOT / "src" / "lorakit", Path(name) / "lorakit")
            file = Path(name) / "lorakit" / one.file
            file.write_text(file.read_text().replace(one.check, one.without))
            passed, words = outcome(one.test, name)
        rows[one.name] = {
            "class": one.name,
            "test": one.test,
            "green_with": green[one.test],
            "red_without": not passed,
            "words": words[:160],
            "note": one.note,
            "commit": commit(),
        }
        print(f"{green[one.test]!s:6} {not passed!s:6} {one.name}: {words[:100]}", flush=True)
    result = {
        "classes": len(rows),
        "green_with_the_check": sum(r["green_with"] for r in rows.values()),
        "red_without_it": sum(r["red_without"] for r in rows.values()),
        "rows": [rows[c.name] for c in table.CLASSES if c.name in rows],
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(
            detect_device("float32", prefer="cpu"), "python benchmarks/silent_failures.py"
        ),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
