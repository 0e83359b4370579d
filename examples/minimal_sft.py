"""LoRA fine-tuning with every step in sight: model, data, loop, adapter.

    python examples/minimal_sft.py --model demo --data my.jsonl --output my-adapter

The same losses as `lorakit train` with lora_dropout 0 (tests/test_minimal_sft.py). What it leaves
out: the memory plan, resume, checkpoints, evaluation, packing. Read it from top to bottom.
"""

import argparse
import math

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import lorakit
from lorakit.model.demo_model import demo_model_dir

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse(words=None):
    """Settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub id, folder, or demo")
    parser.add_argument("--data", required=True, help="a file of examples, as for lorakit train")
    parser.add_argument("--output", default="adapter", help="folder for the adapter")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="examples of an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="examples at a time")
    parser.add_argument("--cutoff-len", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=int, default=32)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(words)


def collate(rows, pad_id):
    """Pad on the right: ids with the pad token, labels with -100, which cross entropy ignores."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.long) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(mask, batch_first=True),
    }


def summed_loss(model, batch):
    """Cross entropy summed over the supervised tokens; position t predicts token t + 1."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def main(words=None):
    """Train, save the adapter, and return the loss of each step."""
    args = parse(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    # Data: chat template applied, tokenized, and -100 on every token that is not an answer.
    data = lorakit.prepare(
        model=args.model, data=args.data, cutoff_len=args.cutoff_len, val_size=0, seed=args.seed
    )["train"]
    print(f"{len(data)} examples")

    # Model: frozen base in 16 bits (float32 on a CPU), adapters in float32.
    folder = str(demo_model_dir()) if args.model == "demo" else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad_id = tokenizer.pad_token_id
    pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.print_trainable_parameters()
    print("layers:", lorakit.accelerate(model))  # fused on a GPU; the line may be left out

    # Loop: the loss of a step is the mean over its supervised tokens, not over micro-batches.
    per_epoch = math.ceil(len(data) / args.batch_size)
    steps = per_epoch * args.epochs
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * steps), steps)
    losses = []
    model.train()
    for epoch in range(args.epochs):
        order = torch.randperm(
            len(data), generator=torch.Generator().manual_seed(args.seed + epoch)
        )
        for begin in range(0, len(data), args.batch_size):
            rows = [data[int(i)] for i in order[begin : begin + args.batch_size]]
            tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
            step_loss = 0.0
            for at in range(0, len(rows), args.micro_batch_size):
                batch = collate(rows[at : at + args.micro_batch_size], pad_id)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                with torch.autocast(device, dtype, enabled=device == "cuda"):
                    loss = summed_loss(model, batch) / tokens
                loss.backward()
                step_loss += loss.item()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(step_loss)
            print(f"step {len(losses)}/{steps}  loss {step_loss:.4f}")

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"adapter in {args.output}")
    return losses


if __name__ == "__main__":
    main()
