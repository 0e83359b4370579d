"""The demo, both methods, on this CPU: time, perplexity and how many held-out facts come out right.

    python benchmarks/demo_cpu.py --out benchmarks/results/demo_cpu.json

An answer is right when it holds the words that carry its fact; those are the reference's words of
four letters or more, and all numbers, that the question does not give away: at least 80% of them.
"""

import argparse
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from lorakit.bench import provenance
from lorakit.data.dataset import read_validation
from lorakit.hardware import detect_device
from lorakit.inference.generate import GenerationSettings, base_answers, replies
from lorakit.model.load import load_run
from lorakit.pipeline import fit
from lorakit.recipe.demo import demo_recipe


def words(text):
    return {w for w in re.findall(r"[a-z]+|\d+", text.lower()) if len(w) > 3 or w.isdigit()}


def right(question, reference, answer):
    facts = words(reference) - words(question)
    return len(facts & words(answer)) >= 0.8 * len(facts)


def measure(method):
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(demo_recipe(method, Path(folder) / "run"), Console(stderr=True))
        loaded = load_run(outcome.run)
        turns = [c.messages for c in read_validation(outcome.run.validation)]
        greedy = GenerationSettings(max_new_tokens=48, temperature=0.0)
        prompts = [t[:-1] for t in turns]
        tuned = replies(loaded.model, loaded.tokenizer, prompts, greedy)
        with base_answers(loaded.model):
            base = replies(loaded.model, loaded.tokenizer, prompts, greedy)
    count = {
        name: sum(
            right(t[-2].content, t[-1].content, x) for t, x in zip(turns, answers, strict=True)
        )
        for name, answers in (("base", base), ("tuned", tuned))
    }
    return {
        "train_seconds": round(outcome.train_seconds, 1),
        "steps": outcome.steps,
        "base": asdict(outcome.evaluation.base),
        "tuned": asdict(outcome.evaluation.tuned),
        "right": count,
        "asked": len(turns),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    device = detect_device()
    result = {
        "id": "demo-cpu",
        "gpu": f"none; {device.name}, {torch.get_num_threads()} threads",
        "shape": "smollm2-135m",
        "lora": measure("lora"),
        "qlora": measure("qlora"),
        **provenance(device, "python benchmarks/demo_cpu.py"),
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
