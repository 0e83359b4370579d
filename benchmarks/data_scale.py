"""A million short chats: peak memory from file to examples, and tokens/s against raw `tokenizers`.

    python benchmarks/data_scale.py --out benchmarks/results/data_scale.json

Raw speed is `encode_batch` of texts that are rendered already, 512 a call, each result looked at
and let go. Ours is from rows in memory to masked examples (rendering, tokens, masks, checks), also
let go; and from rows on disk to examples on disk. They take turns on parts of 20,000 rows in
one process, so that a neighbor on the machine slows all three.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

PART, BLOCK = 20_000, 512
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many "
    "before through years where much your way well down should because long each just state people "
    "temperature velocity government encyclopedia mountain photosynthesis reasonable instrument"
)


def words(rng, count):
    """Common words, and every tenth one nobody has seen, as in real text."""
    known = WORDS.split()
    rare = "abcdefghijklmnoprstuvwy"
    return " ".join(
        "".join(rng.choices(rare, k=rng.randint(4, 9))) if rng.random() < 0.1 else rng.choice(known)
        for _ in range(count)
    )


def write_rows(path, rows):
    rng = random.Random(0)
    with path.open("w") as handle:
        for number in range(rows):
            asked = f"{words(rng, rng.randint(8, 16)).capitalize()} ({number})?"
            told = f"{words(rng, rng.randint(15, 35)).capitalize()}."
            handle.write(json.dumps({"question": asked, "answer": told}) + "\n")


def tokenizer_here():
    from transformers import AutoTokenizer

    from lorakit.data.chat_template.select import resolve_template
    from lorakit.model.demo_model import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    resolve_template(tokenizer, "demo")
    return tokenizer


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def present_bytes():
    return psutil.Process().memory_info().rss


@contextmanager
def anonymous_peak():
    """Yield a list that gets the peak of memory without mapped files, which the system may drop."""
    done, process, peak = threading.Event(), psutil.Process(), [0]

    def sample():
        while not done.wait(0.1):
            memory = process.memory_info()
            peak[0] = max(peak[0], memory.rss - memory.shared)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def prepare_once(path):
    """In a process of its own: seconds and growth of peak memory of one `prepare_data`."""
    from lorakit.data.prepare import prepare_data
    from lorakit.recipe.schema import Recipe

    tokenizer = tokenizer_here()
    before, began = present_bytes(), time.perf_counter()
    with anonymous_peak() as anonymous:
        made = prepare_data(Recipe(model="demo", data=str(path), val_size=1000), tokenizer)
        seconds = time.perf_counter() - began
        made.train.digest()
        for number in range(0, len(made.train), 1000):
            made.train[number]
    return {
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": anonymous[0],
        "peak_rss_growth_bytes": peak_bytes() - before,
        "peak_rss_bytes": peak_bytes(),
        "examples": len(made.train) + len(made.val),
        "tokens": made.report.tokens_train + made.report.tokens_val,
        "faults": {f.kind: f.count for f in made.report.faults},
    }


def compare_speed(path, rows):
    """Tokens a second of both, in turns; the median part of each."""
    from lorakit.data.conversations import read_conversations
    from lorakit.data.dataset import write_examples
    from lorakit.data.issues import IssueLog
    from lorakit.data.tokenize.encode import EncodeConfig, encode_many
    from lorakit.recipe.schema import Recipe

    tokenizer = tokenizer_here()
    recipe = Recipe(model="demo", data=str(path))
    shelf, _ = read_conversations([str(path)], recipe, [])
    gc.set_threshold(50_000, 20, 100)  # as `prepare_data` does
    raw, parts, stream = tokenizer.backend_tokenizer, [], iter(shelf)
    with tempfile.TemporaryDirectory() as folder:
        for begin in range(0, min(rows, 10 * PART), PART):
            items = shelf[begin : begin + PART]
            chats = [[m.as_dict() for m in item.messages] for item in items]
            texts = [tokenizer.apply_chat_template(c, tokenize=False).rstrip("\n") for c in chats]
            began = time.perf_counter()
            tokens = sum(
                len(e.ids)
                for at in range(0, len(texts), BLOCK)
                for e in raw.encode_batch(texts[at : at + BLOCK], add_special_tokens=False)
            )
            raw_seconds = time.perf_counter() - began
            del chats, texts
            rules, began = EncodeConfig.of(recipe), time.perf_counter()
            counted = 0
            for _, made in encode_many(tokenizer, items, rules, IssueLog()):
                counted += sum(len(example.input_ids) for example in made)
            seconds = time.perf_counter() - began
            assert counted == tokens
            del items
            began = time.perf_counter()
            made = encode_many(tokenizer, islice(stream, PART), rules, IssueLog())
            hashes = np.zeros(1, np.uint64)
            write_examples(Path(folder) / "x", ((0, x) for _, x in made), hashes, IssueLog())
            disk_seconds = time.perf_counter() - began
            parts.append([tokens / s for s in (raw_seconds, seconds, disk_seconds)])
    raw, ours, disk = (statistics.median(part[i] for part in parts) for i in range(3))
    ratios = [[part[i] / part[0] for part in parts] for i in (1, 2)]
    return {
        "raw_tokens_per_s": round(raw),
        "ours_tokens_per_s": round(ours),
        "disk_to_disk_tokens_per_s": round(disk),
        "ours_to_raw": round(statistics.median(ratios[0]), 3),
        "disk_to_disk_to_raw": round(statistics.median(ratios[1]), 3),
        "ours_to_raw_parts": [round(ratio, 3) for ratio in ratios[0]],
        "disk_to_disk_to_raw_parts": [round(ratio, 3) for ratio in ratios[1]],
    }


def child(what, path, rows):
    command = [sys.executable, __file__, "--child", what, "--file", path, "--rows", str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["prepare", "speed"])
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    if args.child:
        from lorakit.data import cache

        cache.cache_home = lambda: args.file.parent / "prepared"
        made = prepare_once(args.file) if args.child == "prepare" else None
        print(json.dumps(made or compare_speed(args.file, args.rows)))
        return
    from lorakit.bench import commit

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows)
        result = {
            "rows": args.rows,
            "file_bytes": path.stat().st_size,
            "first_run": child("prepare", path, args.rows),
            "second_run": child("prepare", path, args.rows),
            "speed": child("speed", path, args.rows),
        }
    names = ("lorakit", "tokenizers", "transformers", "numpy")
    result |= {
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
