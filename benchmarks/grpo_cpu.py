"""GRPO on two CPU cores: SmolLM2-135M-Instruct learns to answer briefly.

    .venv/bin/python benchmarks/grpo_cpu.py --output benchmarks/results/grpo_cpu.json

The base answers "The capital of France is Paris." and longer; the reward is 1 for a completion of
at most 30 characters, and 1 more for the name alone. Prints the reward over the steps, and that of
held-out prompts before and after. The goal: the reward at least doubles within 10 minutes.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

from rich.console import Console

from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import read_metrics, write_json
from lorakit.train.resume import library_versions

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin",
    "Egypt": "Cairo", "Canada": "Ottawa", "Greece": "Athens", "Portugal": "Lisbon",
    "Russia": "Moscow", "China": "Beijing", "Austria": "Vienna", "Poland": "Warsaw",
    "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Ireland": "Dublin", "India": "New Delhi", "Thailand": "Bangkok",
    "Iraq": "Baghdad", "Iran": "Tehran", "Hungary": "Budapest", "Belgium": "Brussels",
    "Denmark": "Copenhagen", "Turkey": "Ankara", "Chile": "Santiago", "England": "London",
    "Scotland": "Edinburgh", "Ukraine": "Kyiv", "Vietnam": "Hanoi", "Syria": "Damascus",
    "Lebanon": "Beirut", "Bulgaria": "Sofia", "Romania": "Bucharest", "Croatia": "Zagreb",
    "Serbia": "Belgrade", "Iceland": "Reykjavik",
}  # fmt: skip


def measure(steps: int, generations: int, tokens: int, rate: float) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [
            {"question": f"What is the capital of {country}?", "answer": name}
            for country, name in CAPITALS.items()
        ]
        (folder / "capitals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        resolved = load_recipe(
            {
                "model": "demo",
                "objective": "grpo",
                "data": str(folder / "capitals.jsonl"),
                "system": "Answer with the name only.",
                "reward_funcs": [
                    "exact_answer",
                    {"name": "regex", "pattern": r"^.{1,30}$", "label": "short"},
                ],
                "num_generations": generations,
                "micro_batch_size": generations,
                "gradient_accumulation_steps": 4,
                "max_completion_length": tokens,
                "cutoff_len": 128,
                "learning_rate": rate,
                "max_steps": steps,
                "val_size": 8,
                "dtype": "float32",
                "offline": True,
                "output_dir": str(folder / "run"),
            }
        )
        began = time.perf_counter()
        result = fit(resolved, Console(stderr=True))
        seconds = time.perf_counter() - began
        rows = read_metrics(result.run)
        held = json.loads(result.run.eval.read_text())["metrics"]
    rewards = [row["reward"] for row in rows]
    edge = max(1, len(rewards) // 8)
    return {
        "job": "capitals, SmolLM2-135M-Instruct, LoRA r16, float32",
        "steps": steps,
        "completions_a_step": 4 * generations,
        "max_completion_length": tokens,
        "learning_rate": rate,
        "seconds": round(seconds, 1),
        "train_seconds": round(result.train_seconds, 1),
        "reward_first": sum(rewards[:edge]) / edge,
        "reward_last": sum(rewards[-edge:]) / edge,
        "rewards": [round(reward, 4) for reward in rewards],
        "held_out": held,
        "seconds_a_step": {
            name: round(sum(row[name] for row in rows) / len(rows), 3)
            for name in ("seconds", "seconds/rollout", "seconds/rewards")
        },
        "sampler_difference": rows[0]["sampling/logp_difference"],
        "cpu": platform.processor() or platform.machine(),
        "versions": library_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = measure(given.steps, given.generations, given.tokens, given.rate)
    if given.output:
        write_json(given.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
