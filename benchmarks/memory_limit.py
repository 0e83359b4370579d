"""Whether `memory_limit` binds: the driver's peak of a complete run, its evaluation included.

    python benchmarks/memory_limit.py RESULT.json 15GiB:32 7GiB:12     (limit:layers)

Each row is a real run of the Llama-2-7B shape with random weights on a GPU, in a process of its
own, with held-out rows and greedy answers; the largest figure of NVML for that process counts.
TOKENIZER names a folder with tokenizer files; without it the demo model's are taken.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 2**30


def make(folder: Path, layers: int) -> None:
    """A model of random weights, and 200 rows of about 1,600 tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lorakit.model.demo_model import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(os.environ.get("TOKENIZER") or demo_model_dir())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=layers, num_attention_heads=32, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": f"What is {i}? " + "word " * 700, "answer": f"{i}. " + "and so on " * 300}
        for i in range(200)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, limit: str) -> None:
    """One run; prints its row as JSON on the last line."""
    from lorakit.api import finetune
    from lorakit.bench import provenance
    from lorakit.hardware import detect_device, process_bytes

    peak = 0

    def sample() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process_bytes() or 0)
            time.sleep(0.02)

    threading.Thread(target=sample, daemon=True).start()
    made = finetune(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), method="lora",
        output_dir=str(folder / "run"), max_steps=6, memory_limit=limit, cutoff_len=2048,
    )  # fmt: skip
    plan = json.loads((made.path / "plan.json").read_text())
    device = detect_device()
    row = {
        "limit": limit,
        "peak_process_gib": round(peak / GIB, 3),
        "planned_gib": round(sum(plan["parts"].values()) / GIB, 3),
        "gpu": device.name,
        **{key: value for key, value in provenance(device).items() if key != "command"},
    }
    print(json.dumps(row), flush=True)
    os._exit(0)


def main() -> None:
    if sys.argv[1] == "--run":
        run(Path(sys.argv[2]), sys.argv[3])
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]), int(sys.argv[3]))
        return
    rows = []
    for asked in sys.argv[2:]:
        limit, _, layers = asked.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            me = [sys.executable, __file__]
            subprocess.run([*me, "--make", folder, layers or "32"], check=True)
            done = subprocess.run(
                [*me, "--run", folder, limit], check=True, stdout=subprocess.PIPE, text=True
            )
        rows.append({"layers": int(layers or 32), **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1])
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
