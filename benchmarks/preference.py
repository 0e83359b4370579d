"""DPO beside TRL's DPOTrainer: pairs and tokens a second, and memory, D1 and D2.

    python benchmarks/preference.py D1 D2 --out benchmarks/results/preference_h200.json
    python benchmarks/preference.py --tiny

Random weights at Llama-2-7B's shape, pairs of 2 x 1,024 tokens (half of them the prompt), 8 a step,
rank 16 on all linear layers. D1: LoRA. D2: QLoRA, lorakit within 16 GiB. Each measurement runs in a
process of its own. TRL runs with `--trl-batch` pairs at once, with and without gradient
checkpointing and with its reference in each step and beforehand; the fastest that fits counts.
`tokens_per_second` counts the tokens of both sequences, without the time for a reference computed
beforehand, which is `reference_seconds`. `--tiny`: a tiny shape, on any machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from lorakit.bench import UNTIMED_STEPS, provenance, random_pairs, run_bench
from lorakit.hardware import detect_device

JOBS = {
    "D1": {"method": "lora", "memory": None, "must": 1.5},
    "D2": {"method": "qlora", "memory": "16GiB", "must": 1.3},
}
PAIRS = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(name, options):
    """lorakit on one job."""
    job = JOBS[name]
    overrides = ["objective=dpo", "lora_r=16", "lora_alpha=32", "lora_dropout=0.0"]
    if job["memory"] and not options.tiny:
        overrides.append(f"memory_limit={job['memory']}")
    shape, seq = ("tiny", 64) if options.tiny else ("llama-2-7b", options.seq)
    micro = options.batch
    console = Console(stderr=True)
    return run_bench(
        shape, job["method"], seq, micro, PAIRS // micro, options.steps, overrides, name, console
    )


def theirs(name, options):
    """TRL's DPOTrainer with PEFT's LoRA on the same weights and tokens."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer

    from lorakit.bench import _word_tokenizer
    from lorakit.model.random_init import random_model
    from lorakit.planning.known_models import shape_config

    device = detect_device("auto")
    shape, seq = ("tiny", 64) if options.tiny else ("llama-2-7b", options.seq)
    config = shape_config(shape)
    base = random_model(config, device, JOBS[name]["method"] == "qlora")
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    pairs = random_pairs(PAIRS * options.steps, seq, config.vocab_size)
    rows = []
    for pair in pairs:
        chosen, rejected = pair.sequences
        start = max(1, seq // 2)
        rows.append({"prompt_ids": chosen.input_ids[:start], "chosen_ids": chosen.input_ids[start:],
                     "rejected_ids": rejected.input_ids[start:]})  # fmt: skip
    seconds, clock = [], {"last": 0.0}

    class Timed(DPOTrainer):
        def _wait(self):
            if device.kind == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def training_step(self, *args, **kwargs):
            clock["last"] = clock["last"] or self._wait()
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                now = self._wait()
                seconds.append(now - clock["last"])
                clock["last"] = now
            super().log(logs, *args, **kwargs)

    arguments = DPOConfig(
        output_dir="/tmp/trl-dpo", per_device_train_batch_size=options.trl_batch,
        gradient_accumulation_steps=PAIRS // options.trl_batch, max_steps=options.steps,
        learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[], max_length=None,
        bf16=device.kind == "cuda", use_cpu=device.kind == "cpu", disable_tqdm=True,
        gradient_checkpointing=options.checkpointing, remove_unused_columns=False,
    )  # fmt: skip
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(rows))
    trainer = Timed(model=model, args=arguments, train_dataset=words,
                    processing_class=_word_tokenizer())  # fmt: skip
    trainer.train_dataset = Dataset.from_list(rows)
    reference = 0.0
    if options.reference_first:
        began = time.perf_counter()
        trainer.precompute_ref_logps = True
        trainer.train_dataset = trainer._precompute_ref_logps(
            trainer.train_dataset, "train", options.trl_batch
        )
        reference = time.perf_counter() - began
    trainer.train()
    timed = seconds[min(UNTIMED_STEPS, len(seconds) // 2) :]
    peak = torch.cuda.max_memory_reserved() / 2**30 if device.kind == "cuda" else None
    return {
        "id": name,
        "trl_batch": options.trl_batch,
        "checkpointing": options.checkpointing,
        "reference_first": options.reference_first,
        "tokens_per_second": round(2 * seq * PAIRS / statistics.median(timed), 1),
        "reference_seconds": round(reference, 2),
        "step_seconds": [round(each, 4) for each in seconds],
        "peak_reserved_gib": peak,
        **provenance(device, " ".join(["python", *sys.argv])),
    }


def in_process(*arguments):
    """Result of one measurement in a process of its own; its exit code if it fails."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode, "command": " ".join(arguments)}
    return json.loads(done.stdout.splitlines()[-1])  # TRL prints its metrics before


def compare(name, options):
    """lorakit, and all variants of TRL, on one job."""
    more = ["--steps", str(options.steps), "--seq", str(options.seq)]
    more += ["--tiny"] if options.tiny else []
    mine = in_process("--side", "ours", name, "--batch", str(options.batch), *more)
    variants = [
        in_process("--side", "trl", name, "--trl-batch", str(batch), *flags, *more)
        for batch in ([PAIRS] if options.tiny else [1, 2, 4])
        for flags in ([], ["--checkpointing"], ["--reference-first"],
                      ["--reference-first", "--checkpointing"])
    ]  # fmt: skip
    rates = [each["tokens_per_second"] for each in variants if "failed" not in each]
    best = max(rates, default=None)
    ratio = mine["tokens_per_second"] / best if best and "failed" not in mine else None
    return {"id": name, "must": JOBS[name]["must"], "ratio": ratio, "lorakit": mine,
            "trl": variants}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", help="D1, D2; default both")
    parser.add_argument("--side", choices=["ours", "trl"], help="one measurement, in this process")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a micro-batch of lorakit")
    parser.add_argument("--trl-batch", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--reference-first", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.jobs or list(JOBS)
    if unknown := [name for name in names if name not in JOBS]:
        parser.error(f"unknown job {unknown[0]}, expected some of {', '.join(JOBS)}")
    if options.side:
        result = (ours if options.side == "ours" else theirs)(names[0], options)
        print(json.dumps(result))
        return
    text = json.dumps([compare(name, options) for name in names], indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
