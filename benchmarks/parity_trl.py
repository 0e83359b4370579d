"""Held-out loss of lorakit against a plain TRL + PEFT script: same rows, seed, order and settings.

    python benchmarks/parity_trl.py --data gsm8k.jsonl --out benchmarks/results/parity_trl.json

Both sides train SmolLM2 on the same prompt/completion rows (the template rendered by TRL on its own
on one side, by lorakit on the other) and are scored by one neutral loop in float32.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from lorakit.bench import commit
from lorakit.finetune import fit
from lorakit.hardware import detect_device
from lorakit.model.embedded import demo_model_dir
from lorakit.recipe_file import load_recipe
from lorakit.train.resume import environment

SETTINGS = {"learning_rate": 2e-4, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trl_side(base, rows, steps, seed, folder):
    """The thirty lines: TRL's own preparation, masking, loss and loop."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(
        model,
        LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": r["question"]}],
                "completion": [{"role": "assistant", "content": r["answer"]}],
            }
            for r in rows
        ]
    )
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=SETTINGS["micro_batch_size"],
        gradient_accumulation_steps=SETTINGS["gradient_accumulation_steps"],
        learning_rate=SETTINGS["learning_rate"],
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * steps),
        max_length=2048,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(folder)


def lorakit_side(rows_file, steps, seed, folder):
    """The same job as a recipe."""
    values = {**SETTINGS, "max_steps": steps, "seed": seed, "val_size": 0, "save_every": 10**6}
    flags = {"model": "demo", "data": str(rows_file), "method": "lora", "output_dir": folder}
    fit(load_recipe(None, [], {**flags, **values}), Console(stderr=True))


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
        lorakit_side(train_file, a.steps, a.seed, ours)
        trl_side(base, rows[: a.rows], a.steps, a.seed, theirs)
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
        "versions": environment(device)["versions"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/parity_trl.py --data gsm8k/train.jsonl "
        f"--rows {a.rows} --held-out {a.held_out} --steps {a.steps} --seed {a.seed}",
    }
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
