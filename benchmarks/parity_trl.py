"""Held-out loss of lorakit against a plain TRL + PEFT script: same rows, seed, order and settings.

    python benchmarks/parity_trl.py --data gsm8k.jsonl --out benchmarks/results/parity_trl.json

Both sides train SmolLM2 on the same prompt/completion rows (the template rendered by TRL on its own
on one side, by lorakit on the other) and are scored by one neutral loop in float32.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.model.demo_model import demo_model_dir
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from plain_trl import plain_trl

SETTINGS = {"learning_rate": 2e-4, "micro_batch_size": 4, "gradient_accumulation_steps": 2}


def recipe_of(rows_file, steps, seed, folder):
    """The job as a recipe."""
    values = {**SETTINGS, "max_steps": steps, "seed": seed, "val_size": 0, "save_every": 10**6}
    flags = {"model": "demo", "data": str(rows_file), "method": "lora", "output_dir": folder}
    return load_recipe(None, [], {**flags, **values})


@torch.no_grad()
def neutral_loss(base, adapter, rows):
    """Mean loss per answer token (end of turn included) in float32, by neither side's code."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    loss = count = 0
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)[
            "input_ids"
        ]
        log_p = model(input_ids=torch.tensor([first + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            loss -= log_p[len(first) + i - 1, token].item()
        count += len(answer)
    return loss / count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSONL with question and answer")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    lines = Path(a.data).read_text(encoding="utf-8").splitlines()[: a.rows + a.held_out]
    rows = [json.loads(line) for line in lines]
    base = str(demo_model_dir())
    with tempfile.TemporaryDirectory() as folder:
        train_file = Path(folder) / "train.jsonl"
        train_file.write_text("\n".join(lines[: a.rows]) + "\n", encoding="utf-8")
        ours, theirs = f"{folder}/lorakit", f"{folder}/trl"
        resolved = recipe_of(train_file, a.steps, a.seed, ours)
        fit(resolved, Console(stderr=True))
        pairs = [(r["question"], r["answer"]) for r in rows[: a.rows]]
        trainer = plain_trl(base, pairs, resolved.recipe, theirs)
        trainer.train()
        trainer.save_model(theirs)
        held = rows[a.rows :]
        losses = {
            "base": neutral_loss(base, None, held),
            "lorakit": neutral_loss(base, f"{ours}/adapter", held),
            "trl": neutral_loss(base, theirs, held),
        }
    device = detect_device()
    result = {
        "id": "parity-trl",
        "gpu": f"none; {device.name}, {torch.get_num_threads()} threads",
        "shape": "smollm2-135m",
        "method": "lora",
        "held_out_loss": losses,
        "relative_difference": abs(losses["lorakit"] / losses["trl"] - 1),
        "steps": a.steps,
        "rows": a.rows,
        "held_out_rows": a.held_out,
        "settings": SETTINGS,
        **provenance(
            device,
            "python benchmarks/parity_trl.py --data gsm8k/train.jsonl "
            f"--rows {a.rows} --held-out {a.held_out} --steps {a.steps} --seed {a.seed}",
        ),
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
