"""A thousand bad inputs through `prepare`: how each kind ends, and every traceback.

    python benchmarks/fuzz_data.py --out benchmarks/results/fuzz_data.json

The inputs are those of tests/data/test_fuzz.py, which runs 150 of them.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
import time
from pathlib import Path

from lorakit.bench import commit


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = Path(__file__).parents[1] / "tests" / "data" / "test_fuzz.py"
    spec = importlib.util.spec_from_file_location("test_fuzz", path)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoTokenizer

        from lorakit.data import cache
        from lorakit.data.resolve import resolve_template
        from lorakit.model.embedded import demo_model_dir

        cache.cache_home = lambda: Path(folder) / "prepared"
        tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
        resolve_template(tokenizer, "demo")
        began = time.perf_counter()
        outcomes, failures = fuzz.campaign(tokenizer, Path(folder) / "case", args.inputs)
    by_kind = {}
    for (kind, end), count in sorted(outcomes.items()):
        by_kind.setdefault(kind, {})[end] = count
    names = ("lorakit", "hypothesis", "datasets", "transformers")
    result = {
        "inputs": sum(outcomes.values()),
        "tracebacks": len(failures),
        "outcomes": by_kind,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(*failures, json.dumps(result, indent=2), sep="\n")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
