"""Small preference data, and TRL's own trainers on the examples that lorakit prepares."""

import json

import torch
from rich.console import Console

from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_tokenizer, seed_everything
from lorakit.model.lora_config import add_adapter
from lorakit.pipeline import fit
from lorakit.types import IGNORE

QUIET = Console(quiet=True, stderr=True)
NOUNS = ["box", "cup", "tree", "road", "bird", "stone", "lamp", "door"]


def pairs(count=6):
    """Rows of different lengths, each with its own prompt."""
    return [
        {
            "prompt": f"What is the {NOUNS[i % 8]} {i}?",
            "chosen": " ".join(["It is good."] * (1 + i % 3)),
            "rejected": " ".join(["No idea."] * (1 + i % 2)) + f" {i}",
        }
        for i in range(count)
    ]


def labeled(count=6):
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"],
         "label": bool(i % 3)}
        for i, row in enumerate(pairs(count))
    ]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values_for(objective, rows=6, steps=4, **more):
    """Recipe values of a run with all rows in each step, so that their order has no effect."""
    return {
        "objective": objective, "micro_batch_size": rows, "gradient_accumulation_steps": 1,
        "max_steps": steps, "val_size": 0, "lr_scheduler": "constant", "warmup_steps": 0,
        "optimizer": "sgd", "learning_rate": 0.3, "target_modules": ["q_proj", "v_proj"], **more,
    }  # fmt: skip


def our_run(resolved):
    result = fit(resolved, QUIET)
    rows = [json.loads(line) for line in result.run.metrics.read_text().splitlines()]
    return result.run, [row for row in rows if "loss" in row]


def their_run(objective, resolved, examples, folder):
    """Log history and adapter of TRL's trainer from the same start on the same tokens."""
    from datasets import Dataset

    recipe = resolved.recipe
    seed_everything(recipe.seed)
    base = load_base(recipe, recipe.model, detect_device("float32", prefer="cpu"))
    tokenizer = load_tokenizer(recipe, recipe.model)
    model = add_adapter(base, recipe)
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": recipe.micro_batch_size,
        "max_steps": recipe.max_steps, "learning_rate": recipe.learning_rate, "optim": "sgd",
        "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
        "beta": recipe.beta_value,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "seed": recipe.seed,
        "gradient_checkpointing": False, "remove_unused_columns": False, "max_grad_norm": 1.0,
        "disable_tqdm": True,
    }  # fmt: skip
    if objective == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        text = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(examples)
        args = CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=recipe.simpo_gamma, **common)
        trainer = CPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(text),
                             processing_class=tokenizer)  # fmt: skip
        rows = [_padded_columns(example) for example in examples]
    elif objective == "kto":
        from trl import KTOConfig, KTOTrainer

        text = [{"prompt": "a", "completion": "b", "label": bool(i)} for i in range(len(examples))]
        args = KTOConfig(desirable_weight=recipe.desirable_weight, **common)
        trainer = KTOTrainer(model=model, args=args, train_dataset=Dataset.from_list(text),
                             processing_class=tokenizer)  # fmt: skip
        split = [_parts(example) for example in examples]
        answers = [answer for _, answer in split]
        rows = [
            {"prompt_ids": prompt, "completion_ids": answer, "label": example.good,
             "KL_completion_ids": answers[i - 1]}
            for i, ((prompt, answer), example) in enumerate(zip(split, examples, strict=True))
        ]  # fmt: skip
    else:
        from trl import DPOConfig, DPOTrainer

        text = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(examples)
        loss = {"dpo": "sigmoid", "ipo": "ipo"}[objective]
        trainer = DPOTrainer(model=model, args=DPOConfig(loss_type=[loss], **common),
                             train_dataset=Dataset.from_list(text),
                             processing_class=tokenizer)  # fmt: skip
        rows = []
        for example in examples:
            (prompt, chosen), (_, rejected) = map(_parts, example.sequences)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return history, weights


def _parts(example):
    start = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    # TRL counts all that follows the prompt; lorakit leaves what comes after the end of turn.
    end = max(i for i, label in enumerate(example.labels) if label != IGNORE) + 1
    return example.input_ids[:start], example.input_ids[start:end]


def _padded_columns(example):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for side, sequence in zip(("chosen", "rejected"), example.sequences, strict=True):
        row |= {
            f"{side}_input_ids": sequence.input_ids,
            f"{side}_attention_mask": [1] * len(sequence.input_ids),
            f"{side}_labels": sequence.labels,
        }
    prompt = _parts(example.sequences[0])[0]
    return row | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def adapter_of(run):
    from safetensors.torch import load_file

    weights = load_file(run.adapter / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}


def same_weights(ours, theirs, start=0.0):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
