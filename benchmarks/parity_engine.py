"""The engine against PEFT's own layers: the same run, and PEFT again with other dropout masks.

    python benchmarks/parity_engine.py --data gsm8k.jsonl --out parity_engine.json

Order, start and rate are the same in all runs; only the dropout masks differ between PEFT's, so the
distance between two of its curves is what chance does. The engine draws masks of its own. With
`--dtype float32` rounding is out of the comparison: what is left is what is computed. With
`--oracle` dropout is off, and the engine and PEFT in bfloat16 are held against PEFT in float32.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.model.demo_model import demo_model_dir
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import read_metrics
from lorakit.train.trainer import LoraTrainer
from rehearse_t4 import as_t4

SETTINGS = {
    "learning_rate": 2e-4,
    "lora_dropout": 0.05,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "cutoff_len": 1024,
    "log_every": 1,
}


def train(engine, masks, files, steps, **more_settings):
    """One run: its loss curve and its held-out loss."""
    plain = LoraTrainer.train

    def reseeded(self, *args, **more):
        torch.manual_seed(masks)
        return plain(self, *args, **more)

    LoraTrainer.train = reseeded
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = {
                "model": str(demo_model_dir()),
                "data": str(files[0]),
                "val_data": str(files[1]),
                "method": "lora",
                "output_dir": f"{folder}/run",
                "fused_layers": engine,
                "max_steps": steps,
                **SETTINGS,
                **more_settings,
            }
            outcome = fit(load_recipe(None, [], flags), Console(stderr=True))
            losses = [row["loss"] for row in read_metrics(outcome.run) if "loss" in row]
    finally:
        LoraTrainer.train = plain
    return {
        "engine": engine,
        "masks": masks,
        "held_out_loss": outcome.evaluation.tuned.loss,
        "base_loss": outcome.evaluation.base.loss,
        "train_seconds": round(outcome.train_seconds, 1),
        "losses": losses,
    }


def distance(one, other):
    """Root mean square of the difference of two loss curves."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    squares = [(a - b) ** 2 for a, b in pairs]
    return (sum(squares) / len(squares)) ** 0.5


def share_of_splits(runs):
    """Of all splits of the runs into two halves, those that lie as far apart as ours and PEFT's.

    How far: the mean distance between the halves less the mean distance within. Where the engine
    computes what PEFT does, its runs are like any others, and the share is as likely any number.
    """
    places, half = range(len(runs)), len(runs) // 2
    table = [[distance(x, y) for y in runs] for x in runs]

    def apart(ours):
        theirs = [i for i in places if i not in ours]
        pairs = [*itertools.combinations(ours, 2), *itertools.combinations(theirs, 2)]
        within = sum(table[i][j] for i, j in pairs) / len(pairs)
        between = sum(table[i][j] for i in ours for j in theirs) / len(ours) / len(theirs)
        return between - within

    found = [apart(ours) for ours in itertools.combinations(places, half)]
    return sum(x >= found[0] - 1e-12 for x in found) / len(found)


def compare_masks(engine, files, steps, dtype, draws):
    """The engine against PEFT, each with so many draws of dropout masks."""
    seeds = range(1, draws + 1)
    peft = [train("off", masks, files, steps, dtype=dtype) for masks in seeds]
    ours = [train(engine, draws + masks, files, steps, dtype=dtype) for masks in seeds]
    means = [sum(r["held_out_loss"] for r in runs) / len(runs) for runs in (ours, peft)]
    return {
        "dtype": dtype,
        "curve_distance": {
            "peft_to_peft": [distance(x, y) for x, y in itertools.combinations(peft, 2)],
            "engine_to_peft": [distance(x, y) for x, y in itertools.product(ours, peft)],
            "engine_to_engine": [distance(x, y) for x, y in itertools.combinations(ours, 2)],
        },
        "splits_as_far_apart": share_of_splits([*ours, *peft]),
        "held_out": {
            "peft": [run["held_out_loss"] for run in peft],
            "engine": [run["held_out_loss"] for run in ours],
            "relative_difference": abs(means[0] / means[1] - 1),
        },
        "runs": [*ours, *peft],
    }


def compare_oracle(engine, files, steps):
    """The engine and PEFT in the machine's dtype against PEFT in float32, dropout off."""
    plain = {"lora_dropout": 0.0}
    runs = {
        "engine": train(engine, 1, files, steps, **plain),
        "peft": train("off", 1, files, steps, **plain),
        "peft_float32": train("off", 1, files, steps, dtype="float32", **plain),
    }
    pairs = itertools.combinations(runs, 2)
    return {
        "curve_distance": {f"{x}_to_{y}": distance(runs[x], runs[y]) for x, y in pairs},
        "held_out": {name: run["held_out_loss"] for name, run in runs.items()},
        "runs": runs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSONL with question and answer")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--engine", default="auto", help="on: where auto would not (a CPU)")
    parser.add_argument("--dtype", default="auto", help="float32 leaves rounding out")
    parser.add_argument("--draws", type=int, default=3, help="dropout masks on each side")
    parser.add_argument("--oracle", action="store_true", help="hold both against float32")
    parser.add_argument("--as-t4", action="store_true", help="with --dtype float16: T4 code")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    if a.as_t4:
        as_t4()
    lines = Path(a.data).read_text(encoding="utf-8").splitlines()
    rows = a.steps * SETTINGS["micro_batch_size"]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "train.jsonl", Path(folder) / "held_out.jsonl"
        files[0].write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
        files[1].write_text("\n".join(lines[rows : rows + a.held_out]) + "\n", encoding="utf-8")
        if a.oracle:
            found = compare_oracle(a.engine, files, a.steps)
        else:
            found = compare_masks(a.engine, files, a.steps, a.dtype, a.draws)
    device = detect_device()
    command = f"python benchmarks/parity_engine.py --data gsm8k/train.jsonl --steps {a.steps} "
    command += f"--held-out {a.held_out} --engine {a.engine}" + " --oracle" * a.oracle
    command += f" --dtype {a.dtype} --draws {a.draws}" * (not a.oracle)
    command += " --as-t4" * a.as_t4
    result = {
        "id": "parity-oracle" if a.oracle else "parity-engine",
        "gpu": device.name,
        "shape": "smollm2-135m",
        "method": "lora",
        "steps": a.steps,
        **found,
        "settings": SETTINGS,
        **provenance(device, command),
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print({k: result.get(k) for k in ("curve_distance", "splits_as_far_apart", "held_out")})


if __name__ == "__main__":
    main()
