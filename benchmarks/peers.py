"""What other fine-tuning stacks do on the same job, one peer per process.

    python benchmarks/peers.py make-model --out m7
    python benchmarks/peers.py run --peer unsloth --job lora --model m7 --dropout 0 --output u.json

Same shape, tokens a step, targets, optimizer as `lorakit bench`, and random weights: speed and
memory do not depend on their values. Tokens/s: the median step after three untimed ones.
Seen together on Python 3.12: torch 2.11, transformers 5.17, peft 0.21, trl 1.15,
bitsandbytes 0.50.2, liger-kernel 0.8.5, unsloth 2026.10.9 with unsloth-zoo, axolotl 0.21.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "unsloth")
JOBS = {  # lorakit's default recipes
    "lora": {"r": 16, "alpha": 32, "dropout": 0.05, "lr": 1e-4, "micro": 1, "accum": 8},
    "qlora": {"r": 64, "alpha": 16, "dropout": 0.1, "lr": 2e-4, "micro": 4, "accum": 4},
}
UNTIMED_STEPS = 3
GIB = 2**30


def make_model(a):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(a.vocab - 3)}
    words.update({"<unk>": a.vocab - 3, "<s>": a.vocab - 2, "</s>": a.vocab - 1})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=4096,
    )
    fast.chat_template = (
        "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    )
    fast.save_pretrained(a.out)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=4096,
        intermediate_size=a.mlp,
        num_hidden_layers=a.layers,
        num_attention_heads=32,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=4096,
        bos_token_id=a.vocab - 2,
        eos_token_id=a.vocab - 1,
        pad_token_id=a.vocab - 3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(a.out, max_shard_size="2GB")


def make_rows(a, job, vocabulary):
    """Fixed: every row is exactly `seq` tokens. Mixed: instruction-like lengths, prompt masked."""
    import numpy as np

    generator = np.random.default_rng(0)
    mixed = a.data == "mixed"
    rows = []
    for _ in range(job["micro"] * job["accum"] * (a.steps + 1) * (8 if mixed else 1)):
        length = int(np.clip(generator.lognormal(5.3, 0.8), 16, a.seq)) if mixed else a.seq
        prompt = int(length * 0.4) if mixed else 0
        ids = generator.integers(10, vocabulary - 10, length).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * (length - prompt)})
    return rows


def load_unsloth(a, job):
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        a.model,
        max_seq_length=a.seq,
        dtype=torch.bfloat16,
        load_in_4bit=a.job == "qlora",
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["r"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        target_modules=TARGETS,
        bias="none",
        random_state=0,
        use_gradient_checkpointing={0: False, 1: True, 2: "unsloth"}[a.ckpt],
    )
    return model, tokenizer, None


def load_trl(a, job):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = None
    if a.job == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        a.model,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0},
        attn_implementation=a.attn,
    )
    model.config.use_cache = False
    adapter = LoraConfig(
        r=job["r"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    if a.peer == "axolotl":
        return axolotl_kernels(a, model, adapter), tokenizer, None
    return model, tokenizer, adapter


def axolotl_kernels(a, model, adapter):
    """Axolotl's LoRA kernels on the model, dtypes as its loader leaves them."""
    import torch
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault
    from peft import get_peft_model, prepare_model_for_kbit_training

    settings = DictDefault(
        base_model=a.model,
        lora_mlp_kernel=True,
        lora_qkv_kernel=True,
        lora_o_kernel=True,
        trust_remote_code=False,
        adapter=a.job,
    )
    patch_self_attn_lora(settings)
    if a.job == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(a.ckpt))
        for p in model.parameters():
            if p.dtype == torch.float32:
                p.data = p.data.to(torch.bfloat16)
    model = get_peft_model(model, adapter)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model = apply_lora_kernel_patches(model, settings)
    if a.ckpt:
        model.enable_input_require_grads()
    return model


def training_arguments(a, job):
    from trl import SFTConfig

    extra = {}
    if a.peer in ("trl-liger", "axolotl"):
        extra["use_liger_kernel"] = True
    if a.packing:
        extra["packing"] = True
    if a.peer != "unsloth":
        extra["gradient_checkpointing"] = bool(a.ckpt)
        if a.ckpt:
            extra["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["micro"],
        gradient_accumulation_steps=job["accum"],
        max_steps=a.steps,
        learning_rate=job["lr"],
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        optim="adamw_torch_fused",
        max_length=a.seq,
        warmup_steps=0,
        lr_scheduler_type="constant",
        seed=0,
        disable_tqdm=True,
        **extra,
    )


def timed_training(trainer):
    """(seconds, tokens, losses) of each optimizer step; padding is not counted as tokens."""
    import torch
    from transformers import TrainerCallback

    seconds, tokens, losses = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.start = time.perf_counter()
            tokens.append(0)

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                losses.append(round(float(logs["loss"]), 4))

    step = trainer.training_step

    def counted(model, inputs, *rest, **more):
        mask = inputs.get("attention_mask")
        tokens[-1] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return step(model, inputs, *rest, **more)

    trainer.add_callback(Clock())
    trainer.training_step = counted
    trainer.train()
    return seconds, tokens, losses


def run(a):
    if a.peer == "unsloth":
        import unsloth  # noqa: F401  (it must come before transformers)
    import torch
    from datasets import Dataset
    from transformers import AutoConfig
    from trl import SFTTrainer

    job = {**JOBS[a.job]}
    job.update({k: v for k in ("dropout", "micro", "accum") if (v := getattr(a, k)) is not None})
    torch.manual_seed(0)
    free, _ = torch.cuda.mem_get_info()
    rows = Dataset.from_list(make_rows(a, job, AutoConfig.from_pretrained(a.model).vocab_size))
    model, tokenizer, adapter = (load_unsloth if a.peer == "unsloth" else load_trl)(a, job)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(a, job),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    torch.cuda.reset_peak_memory_stats()
    seconds, tokens, losses = timed_training(trainer)
    left, _ = torch.cuda.mem_get_info()
    timed = slice(UNTIMED_STEPS, None)
    rates = [n / s for n, s in zip(tokens[timed], seconds[timed], strict=True)]
    result = {
        **{k: getattr(a, k) for k in ("peer", "job", "data", "packing", "ckpt", "attn", "seq")},
        **{k: job[k] for k in ("dropout", "micro", "accum")},
        "gpu": torch.cuda.get_device_name(),
        "tokens_per_second": round(statistics.median(rates), 1),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "process_gib": round((free - left) / GIB, 3),
        "losses": losses,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/peers.py", *without_output(sys.argv[1:])]),
    }
    if a.output:
        a.output.write_text(json.dumps(result, indent=2) + "\n")
    short = ("peer", "job", "data", "dropout", "micro", "ckpt", "tokens_per_second", "process_gib")
    print("RESULT", {k: result[k] for k in short})


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def without_output(words):
    if "--output" in words:
        at = words.index("--output")
        return words[:at] + words[at + 2 :]
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make-model")
    make.add_argument("--out", required=True)
    make.add_argument("--layers", type=int, default=32)
    make.add_argument("--mlp", type=int, default=11008)
    make.add_argument("--vocab", type=int, default=32000)
    make.add_argument("--kv-heads", type=int, default=32)
    one = commands.add_parser("run")
    one.add_argument("--peer", choices=["trl", "trl-liger", "unsloth", "axolotl"], required=True)
    one.add_argument("--job", choices=list(JOBS), required=True)
    one.add_argument("--model", required=True)
    one.add_argument("--data", choices=["fixed", "mixed"], default="fixed")
    one.add_argument("--packing", type=int, default=0)
    one.add_argument("--dropout", type=float)
    one.add_argument("--micro", type=int)
    one.add_argument("--accum", type=int)
    one.add_argument("--ckpt", type=int, default=1, help="2: Unsloth's offloaded checkpointing")
    one.add_argument("--attn", default="sdpa")
    one.add_argument("--seq", type=int, default=2048)
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--output", type=Path)
    a = parser.parse_args()
    make_model(a) if a.command == "make-model" else run(a)


if __name__ == "__main__":
    main()
