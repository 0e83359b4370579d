"""TRL's unmodified SFTTrainer with and without `lorakit.accelerate`, in turn on one GPU.

    python benchmarks/accelerate_sft.py RESULT.json

Llama-2-7B's shape with random weights, LoRA rank 16 on all projections, rows of 2,048 tokens that
are all trained, 1 row a micro-batch, 8 micro-batches a step; float32 adapters, bf16 autocast.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import lorakit
from lorakit.bench import provenance
from lorakit.hardware import detect_device

LENGTH, ROWS, STEPS = 2048, 8, 8
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Time at the end of each step, the GPU's work included."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure(tokenizer, accelerated):
    """Tokens/s, peak memory and losses of one run."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, max_position_embeddings=4096,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        base = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=NAMES))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers = lorakit.accelerate(model) if accelerated else "the model's own"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32_000, (STEPS * ROWS, LENGTH), generator=generator).tolist()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS, gradient_checkpointing=False, bf16=True,
            logging_steps=1, report_to=[], save_strategy="no", max_length=None, learning_rate=1e-4,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seconds = (clock.ends[-1] - clock.ends[2]) / (len(clock.ends) - 3)
    return {
        "layers": layers,
        "tokens_per_second": round(ROWS * LENGTH / seconds, 1),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(loss, 4) for loss in losses],
    }


def main():
    device = detect_device()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2]) if len(sys.argv) > 2 else None
    rows = {name: measure(tokenizer, name == "accelerated") for name in ("plain", "accelerated")}
    rows |= {"gpu": device.name}
    rows |= {key: value for key, value in provenance(device).items() if key != "command"}
    print(json.dumps(rows, indent=1))
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
