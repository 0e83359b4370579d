"""Recipes that were cut, misspelt, stuffed and shaken: a recipe or one clear error, never a trace.

`benchmarks/fuzz.py recipes` runs the same campaign with 20,000.
"""

import random
import time
import traceback
from collections import Counter
from pathlib import Path

from rich.console import Console

from lorakit.errors import LorakitError
from lorakit.pipeline import prepare_run
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
SEEDS = [p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))]
SEEDS += [(ROOT / "src" / "lorakit" / "assets" / "demo.yaml").read_text()]
SEEDS += [
    "model: demo\ndata: [a.jsonl, {source: b.csv, weight: 0.5}]\ncolumns: {instruction: q}\n"
    "lora_r: 8\nlearning_rate: 2e-4\nval_size: 0.1\ntarget_modules: [q_proj, v_proj]\n"
    "memory_limit: 15GiB\nrank_pattern: {layers.0: 4}\nreport_to: [wandb]\nsystem: |\n  Be kind.\n"
]
KEYS = [*Recipe.model_fields, "lr", "batch_size", "dataset", "r", "Model", "modle", "", "?", "a b"]
VALUES = [
    "1", "0", "-1", "1.5", "1e400", "-.inf", ".nan", "9" * 400, "0x10", "0o7", "1_000", "1:30",
    "true", "yes", "null", "~", '""', "''", "demo", "../..", "/etc/passwd", "user/name",
    "https://10.0.0.1/x", "file:///etc/passwd", "hf_" + "x" * 34, "[]", "{}", "[1, [2]]",
    "{a: {b: c}}", "[null]", "{1: 2}", "!!python/object/apply:os.system [true]", "!x y",
    "&a b", "*a", "<<", "2001-01-01", "|\n  text", "> folded", '"\\ud800"', '"\\0"', '"\\x1b[2J"',
    "é", "日本", "\u2028", "x" * 5000, "[" * 30, "15GiB", "9e99GiB", "auto", "all-linear",
    "(a+)+$", "[q_proj]", "{source: a, weight: 1e9}", "lora", "qlora", "%", "@", "`",
]  # fmt: skip
PIECES = ["\n", "\n\n", ":", ": ", " ", "\t", "-", "- ", "#", "{", "}", "[", "]", ",", "'", '"',
          "\\", "\0", "\ufeff", "\r", "---\n", "...\n", "!!", "&a ", "*a", "<<: ", "%YAML 1.2\n",
          "\x85", "\ud7ff", "😀", "|", ">"]  # fmt: skip


def mutated(rng):
    """A recipe's bytes, changed one to four times."""
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        way = rng.randrange(9)
        if way == 0:
            lines[at] = f"{rng.choice(KEYS)}: {rng.choice(VALUES)}"
        elif way == 1:
            lines.insert(at, f"{rng.choice(KEYS)}: {rng.choice(VALUES)}")
        elif way == 2:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(VALUES)
        elif way == 3:
            lines[at] = " " * rng.randint(1, 4) + lines[at]
        elif way == 4:
            del lines[at]
        elif way == 5:
            lines.append(rng.choice(lines))
        text = "\n".join(lines)
        place = rng.randrange(len(text) + 1)
        if way == 6:
            text = text[:place] + rng.choice(PIECES) + text[place:]
        elif way == 7:
            text = text[:place] + text[place + rng.randint(1, 9) :]
        elif way == 8:
            data = bytearray(text.encode("utf-8", "surrogateescape"))
            if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            text = data.decode("utf-8", "surrogateescape")
    return text.encode("utf-8", "surrogateescape")


def check(path, flags):
    """What came of one recipe; a fault of ours raises. With `flags` a dry run follows."""
    resolved, fault = None, None
    try:
        resolved = load_recipe(path)
    except LorakitError as error:
        fault = error
    if resolved is None:
        assert fault.exit_code == 2
        assert str(path) in fault.message
        assert str(fault).encode()
        return "refused"
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again.recipe == resolved.recipe, "a resolved recipe reads back as itself"
    if flags is None:
        return "kept"
    try:
        prepare_run(load_recipe(path, flags=flags), Console(quiet=True))
    except LorakitError as error:
        str(error).encode()
        return "refused by a dry run"
    return "dry run"


def campaign(folder, count, flags, seed=0, dry_every=10):
    """`count` recipes: outcomes, the traceback of each failure, seconds of work of the slowest."""
    outcomes, failures, slowest = Counter(), [], 0.0
    rng, kept = random.Random(seed), 0
    path = folder / "recipe.yaml"
    for _ in range(count):
        data = mutated(rng)
        path.write_bytes(data)
        began = time.process_time()
        try:
            end = check(path, flags if kept % dry_every == 0 else None)
            kept += end != "refused"
        except Exception:
            end = "failed"
            failures.append(f"{data[:3000]!r}\n{traceback.format_exc()}")
        slowest = max(slowest, time.process_time() - began)
        outcomes["recipe", end] += 1
    return outcomes, failures, slowest


def test_recipes_that_were_shaken(tmp_path, tiny_model_dir, tiny_data):
    flags = {"model": str(tiny_model_dir), "data": str(tiny_data), "offline": True}
    outcomes, failures, _ = campaign(tmp_path, 300, flags)
    assert not failures, failures[0]
    assert outcomes["recipe", "refused"] > 50
    assert outcomes["recipe", "kept"] + outcomes["recipe", "dry run"] > 30
    assert outcomes["recipe", "dry run"] > 0
