"""Libraries that were weighed against code of our own: JSON lists and near duplicates.

    pip install ijson rensa datasketch scipy
    python benchmarks/libraries.py --out benchmarks/results/libraries.json

Each measurement runs in a process of its own, since its peak memory is that of the process. A
library that is not installed is left out. docs/decisions/001 and 007 have the conclusions.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_OF_LIST = 100_000
# (function, rows): the slowest library gets fewer.
NEAR = {"ours": 200_000, "rensa": 200_000, "datasketch": 10_000}
VALUES = {
    "single quotes": b"[{'a': 1}]",
    "lone surrogate": b'[{"a": "\\ud800"}]',
    "30 digits": b'[{"a": 123456789012345678901234567890}]',
    "NaN": b'[{"a": NaN}]',
    "byte order mark": b'\xef\xbb\xbf[{"a": 1}]',
    "20,000 brackets": b"[" * 20_000,
}


def peak_mb():
    """Peak of this process; getrusage would count the parent's memory at the fork too."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def own_items(path):
    from lorakit.data.sources.json_stream import items_of
    from lorakit.data.sources.locate import DataFile

    return items_of(DataFile(str(path), path.name, ".json"))


def ijson_items(path):
    import ijson

    return ijson.items(io.BytesIO(path.read_bytes()), "item", use_float=True)


def read_lists(name):
    """Seconds for a list of rows, and what becomes of unusual values."""
    items = {"ours": own_items, "ijson": ijson_items}[name]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        rows = (
            {"messages": [{"role": "user", "content": "word " * draw.randint(10, 120)}], "n": n}
            for n in range(ROWS_OF_LIST)
        )
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
        began = time.perf_counter()
        count = sum(1 for _ in items(path))
        seconds, size = time.perf_counter() - began, path.stat().st_size
        outcomes = {}
        for kind, text in VALUES.items():
            path.write_bytes(text)
            before, began = peak_mb(), time.perf_counter()
            try:
                outcome = ascii(list(items(path)))
            except Exception as error:
                outcome = f"{type(error).__name__}: {ascii(str(error))[1:160]}"
            grown = peak_mb() - before
            outcomes[kind] = f"{outcome} ({time.perf_counter() - began:.2f} s, {grown:.0f} MB)"
    return {"rows": count, "mb": size / 1e6, "seconds": round(seconds, 2), "values": outcomes}


def texts(count):
    """Chats of 60 words; of 20, one is the same each time and one differs from it by a word."""
    words = [f"w{n:04d}" for n in range(5000)]
    common = random.Random(7).choices(words, k=60)
    for n in range(count):
        if n % 20 == 0:
            yield " ".join(common)
        elif n % 20 == 1:
            yield " ".join([*common[:5], f"x{n}", *common[6:]])
        else:
            yield " ".join(random.Random(n).choices(words, k=60))


def shingles(text):
    return [text[at : at + 8] for at in range(len(text) - 7)]


def own_duplicates(rows):
    import numpy as np

    from lorakit.data.dedup import near_twins, sign

    rows, signatures = iter(rows), []
    while block := list(itertools.islice(rows, 1000)):
        signatures.append(sign(block))
    signatures = np.concatenate(signatures)
    return int((near_twins(signatures) >= 0).sum())


def rensa_duplicates(rows):
    import rensa

    index = rensa.RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16)
    kept, found = [], 0
    for n, text in enumerate(rows):
        signature = rensa.RMinHash(128, 42)
        signature.update(shingles(text))
        candidates = index.query(signature)[:8]
        found += any(index.is_similar(kept[other], signature) for other in candidates)
        index.insert(n, signature)
        kept.append(signature)
    return found


def datasketch_duplicates(rows):
    from datasketch import MinHash, MinHashLSH

    index, found = MinHashLSH(threshold=0.8, num_perm=128), 0
    for n, text in enumerate(rows):
        signature = MinHash(128)
        signature.update_batch([piece.encode() for piece in shingles(text)])
        found += bool(index.query(signature))
        index.insert(n, signature)
    return found


def find_duplicates(name):
    count = NEAR[name]
    began = time.perf_counter()
    for _ in texts(count):
        pass
    making, before = time.perf_counter() - began, peak_mb()
    find = {"ours": own_duplicates, "rensa": rensa_duplicates, "datasketch": datasketch_duplicates}
    began = time.perf_counter()
    found = find[name](texts(count))
    seconds = time.perf_counter() - began - making
    return {
        "rows": count,
        "duplicates": found,
        "us_per_row": round(1e6 * seconds / count, 1),
        "kb_per_row": round(1024 * (peak_mb() - before) / count, 2),
    }


MEASURES = {"lists": (read_lists, ["ours", "ijson"]), "near": (find_duplicates, list(NEAR))}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help="a measurement and a library, in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(MEASURES[args.one[0]][0](args.one[1])))
        return
    result, versions = {}, {}
    for measure, (_, names) in MEASURES.items():
        for name in names:
            if name != "ours" and importlib.util.find_spec(name) is None:
                continue
            command = [sys.executable, __file__, "--one", measure, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result.setdefault(measure, {})[name] = json.loads(done.stdout.splitlines()[-1])
            if name != "ours":
                versions[name] = importlib.metadata.version(name)
    from lorakit.bench import provenance
    from lorakit.hardware import detect_device

    facts = provenance(detect_device(prefer="cpu"), "python benchmarks/libraries.py")
    result |= {"libraries": versions, "cpu": detect_device(prefer="cpu").name, **facts}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
