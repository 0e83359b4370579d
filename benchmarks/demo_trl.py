"""The demo's training against the same job in plain TRL + PEFT, turn about, on this CPU.

    python benchmarks/demo_trl.py --out benchmarks/results/demo_trl.json

Same model, rows, batches, rate, steps and dtype; only the training loop is timed on both sides.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.model.demo_model import demo_model_dir
from lorakit.pipeline import fit
from lorakit.recipe.demo import demo_recipe
from lorakit.storage.run_dir import read_metrics
from plain_trl import plain_trl


def trl_seconds(recipe):
    """Wall-clock seconds of the training loop, and the last loss, of the usual script."""
    text = (files("lorakit") / "assets" / "demo_train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    pairs = [(r["instruction"], r["response"]) for r in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = plain_trl(str(demo_model_dir()), pairs, recipe, folder)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return seconds, [r["loss"] for r in trainer.state.log_history if "loss" in r][-1]


def lorakit_seconds():
    """The same of `lorakit demo`, checkpoint at the end included."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(demo_recipe("lora", Path(folder) / "run"), Console(stderr=True))
        return outcome.train_seconds, [r["loss"] for r in read_metrics(outcome.run)][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    recipe = demo_recipe("lora").recipe
    rounds = [{"lorakit": lorakit_seconds(), "trl": trl_seconds(recipe)} for _ in range(a.rounds)]
    median = {k: statistics.median(r[k][0] for r in rounds) for k in ("lorakit", "trl")}
    device = detect_device()
    result = {
        "id": "P8",
        "gpu": f"none; {device.name}, {torch.get_num_threads()} threads",
        "shape": "smollm2-135m",
        "method": "lora",
        "steps": recipe.max_steps,
        "train_seconds": {k: [round(r[k][0], 1) for r in rounds] for k in median},
        "final_loss": {k: [r[k][1] for r in rounds] for k in median},
        "speed_ratio": round(median["trl"] / median["lorakit"], 3),
        **provenance(device, f"python benchmarks/demo_trl.py --rounds {a.rounds}"),
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
