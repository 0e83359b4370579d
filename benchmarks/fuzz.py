"""Thousands of bad inputs: how each kind ends, every traceback, and the slowest.

    python benchmarks/fuzz.py recipes --inputs 20000 --out benchmarks/results/fuzz_recipes.json
    python benchmarks/fuzz.py data --inputs 10000 --out benchmarks/results/fuzz_data.json
    python benchmarks/fuzz.py exports --inputs 10000 --out benchmarks/results/fuzz_exports.json
    python benchmarks/fuzz.py chat --inputs 1000 --out benchmarks/results/fuzz_chat.json
    python benchmarks/fuzz.py report --inputs 2000 --out benchmarks/results/fuzz_report.json

The inputs are those of the tests of the same name, which run a share of them each time.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console

from lorakit.bench import provenance
from lorakit.hardware import detect_device

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS.parent))  # the tests import from one another
COUNTS = {"recipes": 20_000, "data": 10_000, "exports": 10_000, "chat": 1_000, "report": 2_000}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model(folder):
    """The tests' own tiny model and data, without pytest."""
    from transformers import AutoTokenizer

    from lorakit.model.demo_model import demo_model_dir

    class Folders:
        def mktemp(self, name):
            (folder / name).mkdir()
            return folder / name

    conftest = load(TESTS / "conftest.py")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    model = conftest.tiny_model_dir.__wrapped__(tokenizer, Folders())
    return model, conftest.tiny_data.__wrapped__(Folders()), conftest


def fuzz_recipes(folder, count):
    model, data, _ = tiny_model(folder)
    flags = {"model": str(model), "data": str(data), "offline": True}
    return load(TESTS / "test_fuzz_recipe.py").campaign(folder, count, flags)


def demo_tokenizer():
    from transformers import AutoTokenizer

    from lorakit.data.chat_template.select import resolve_template
    from lorakit.model.demo_model import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    resolve_template(tokenizer, "demo")
    return tokenizer


def fuzz_data(folder, count):
    return load(TESTS / "data" / "test_fuzz.py").campaign(demo_tokenizer(), folder / "case", count)


def fuzz_exports(folder, count):
    campaign = load(TESTS / "data" / "test_fuzz_exports.py").campaign
    return campaign(demo_tokenizer(), folder / "case", count)


def fuzz_chat(folder, count):
    from lorakit.pipeline import fit

    model, data, conftest = tiny_model(folder)
    resolved = conftest._tiny_recipe(model, data, folder / "run")
    made = fit(resolved, Console(quiet=True))
    (folder / "home").mkdir()
    return load(TESTS / "test_fuzz_chat.py").campaign(made.run, folder / "home", count)


def fuzz_report(folder, count):
    run = load(TESTS / "report" / "conftest.py").make_run.__wrapped__(folder)()
    return load(TESTS / "report" / "test_fuzz.py").campaign(run, folder, count)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=COUNTS)
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    count = args.inputs or COUNTS[args.kind]
    with tempfile.TemporaryDirectory() as work:
        from lorakit.data import cache

        folder = Path(work)
        cache.cache_home = lambda: folder / "prepared"
        began = time.perf_counter()
        outcomes, failures, slowest = globals()[f"fuzz_{args.kind}"](folder, count)
    by_kind = {}
    for (kind, end), number in sorted(outcomes.items()):
        by_kind.setdefault(kind, {})[end] = number
    result = {
        "inputs": sum(outcomes.values()),
        "tracebacks": len(failures),
        # Of the processor: other jobs on the machine do not count, and whatever waited would show
        # in the whole.
        "slowest_cpu_seconds": round(slowest, 2),
        "outcomes": by_kind,
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(detect_device(), f"python benchmarks/fuzz.py {args.kind} --inputs {count}"),
    }
    print(*failures[:20], json.dumps(result, indent=2), sep="\n")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
