"""CPU seconds of a demo step here and in plain TRL + PEFT, in alternation, without the engine.

    OMP_NUM_THREADS=1 python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.json

CPU time of the process, not wall-clock time, so that other programs on the machine count little.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

import lorakit.pipeline as pipeline
from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.model.demo_model import demo_model_dir
from lorakit.recipe.demo import demo_recipe
from plain_trl import plain_trl


class Clock(TrainerCallback):
    """Process time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.process_time())

    def median(self):
        """Median of all steps but the first."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return round(statistics.median(b - a for a, b in pairs), 3)


def of_lorakit(steps):
    """The demo, without its evaluation."""
    clock, own = Clock(), pipeline.LoraTrainer

    class Timed(own):
        def __init__(self, *args, **values):
            super().__init__(*args, **values)
            self.add_callback(clock)

    pipeline.LoraTrainer = Timed
    with tempfile.TemporaryDirectory() as folder:
        recipe = demo_recipe("lora", Path(folder) / "run")
        recipe = recipe.derive("benchmark", max_steps=steps, val_data=None, val_size=0)
        try:
            pipeline.fit(recipe, Console(file=io.StringIO()))
        finally:
            pipeline.LoraTrainer = own
    return clock.median()


def of_trl(steps):
    """The usual script, with float32 adapters as here."""
    recipe = demo_recipe("lora").recipe.model_copy(update={"max_steps": steps})
    text = (files("lorakit") / "assets" / "demo_train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    pairs = [(r["instruction"], r["response"]) for r in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = plain_trl(str(demo_model_dir()), pairs, recipe, folder)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer.add_callback(clock)
        trainer.train()
    return clock.median()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rounds = [{"lorakit": of_lorakit(a.steps), "trl": of_trl(a.steps)} for _ in range(a.rounds)]
    median = {k: statistics.median(r[k] for r in rounds) for k in ("lorakit", "trl")}
    device = detect_device()
    result = {
        "id": "cpu-step",
        "gpu": f"none; {device.name}, {torch.get_num_threads()} threads",
        "shape": "smollm2-135m",
        "method": "lora",
        "cpu_seconds_per_step": {k: [r[k] for r in rounds] for k in median},
        "speed_ratio": round(median["trl"] / median["lorakit"], 3),
        **provenance(
            device, f"python benchmarks/cpu_step.py --rounds {a.rounds} --steps {a.steps}"
        ),
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
