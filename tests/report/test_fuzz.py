"""A run's files with anything in them: a sound page, or one message; never a traceback or markup.

`benchmarks/fuzz.py report` runs the same campaign with 2,000 runs.
"""

import json
import random
import shutil
import time
import traceback
from collections import Counter

from tests.pages import Reader

from lorakit.errors import LorakitError
from lorakit.report.page import write_report
from lorakit.storage.run_dir import RunDir

FILES = [
    "data_report.json", "plan.json", "eval.json", "environment.json", "export/verify.json",
    "metrics.jsonl", "recipe.yaml",
]  # fmt: skip
VALUES = [
    None, -1, 0, 1e400, float("nan"), "<script>a()</script>", "\" onload=a() x='", [], {}, [1],
    {"a": 1}, True, "", 10**400, -(10**400), "\ud800", "\0", 1e-320, 10**20, "2", [[]], [None],
]  # fmt: skip


def bent(value, rng):
    """The same with one thing in it taken away or put in another's place."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = bent(value[key], rng)
        return value
    return rng.choice(VALUES)


def spoil(path, rng):
    """Flip bytes of the file, or bend what it says."""
    text = path.read_text()
    if path.suffix == ".yaml" or rng.random() < 0.2:
        raw = bytearray(text.encode())
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        for _ in range(rng.randint(1, 20)):
            place = rng.randrange(len(rows))
            rows[place] = bent(rows[place], rng)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(bent(json.loads(text), rng)))


def campaign(run, folder, count, seed=0):
    """`count` spoiled copies of `run`: outcomes, each failure's traceback, slowest seconds."""
    outcomes, failures, slowest, rng = Counter(), [], 0.0, random.Random(seed)
    for _ in range(count):
        copy = RunDir(folder / "copy")
        shutil.copytree(run.path, copy.path)
        name = rng.choice(FILES)
        spoil(copy.path / name, rng)
        began = time.process_time()
        try:
            text = write_report(copy).read_text()
            tags = Reader(text).tags
            assert "script" not in {tag for tag, _ in tags}
            assert not [name for _, given in tags for name in given if name.startswith("on")]
            end = "page"
        except LorakitError:
            end = "message"
        except Exception:
            end = "failed"
            failures.append(f"{name}\n{traceback.format_exc()}")
        slowest = max(slowest, time.process_time() - began)
        outcomes[name, end] += 1
        shutil.rmtree(copy.path)
    return outcomes, failures, slowest


def test_files_with_anything_in_them(make_run, tmp_path):
    outcomes, failures, _ = campaign(make_run(), tmp_path, 60)
    assert not failures, failures[0]
    assert sum(n for (_, end), n in outcomes.items() if end == "page") > 12
