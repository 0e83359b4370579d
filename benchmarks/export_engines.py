"""One run in every format, loaded in engines that lorakit did not write, on the same prompts.

    python benchmarks/export_engines.py runs/NAME --output benchmarks/results/export_engines.json

The run should be trained with dtype float32, so that F16 is the first rounding. Prints KL in nats
per token against the adapter in PEFT, equal top tokens, equal greedy answers, ends of turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

# transformers looks for a package named `kernels`, and would find kernels.py beside this file.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).parent.resolve()]

import torch  # noqa: E402

from lorakit.export import llama_cpp  # noqa: E402
from lorakit.export.adapter import fold_adapter  # noqa: E402
from lorakit.export.converter import Conversion, convert_all  # noqa: E402
from lorakit.export.gguf import compare_heard  # noqa: E402
from lorakit.export.kquants import quantize_gguf  # noqa: E402
from lorakit.export.merge import write_merged  # noqa: E402
from lorakit.export.source import float32_model, open_source  # noqa: E402
from lorakit.export.spelling import write_config, write_tokenizer  # noqa: E402
from lorakit.export.verify import agreement, make_reference, predictions  # noqa: E402
from lorakit.run_dir import open_run  # noqa: E402

PROMPTS, TOKENS, TOP = 50, 24, 512


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--output", type=Path, default=None)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-engines-") as folder:
        result = measure(open_source(open_run(asked.run)), Path(folder))
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if asked.output:
        asked.output.write_text(text)


def measure(source, work: Path) -> dict:
    reference = make_reference(source, float32_model(source), PROMPTS, TOKENS)
    rows = {}
    merged = work / "merged"
    merged.mkdir()
    write_merged(source, merged, "trained", "float32")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    rows["merged (transformers)"] = agreement(reference, partial(predictions, plain)).as_dict()
    del plain
    files = write_files(source, merged, work)
    for name, (model, adapter) in files.items():
        began = time.perf_counter()
        tasks = [
            llama_cpp.Task(str(model), reference.prompts, TOKENS, adapter and str(adapter), (), TOP)
        ]
        (heard,) = llama_cpp.ask_all(tasks)
        found = compare_heard(source, reference, heard)
        seconds = round(time.perf_counter() - began, 1)
        rows[name] = {**found.as_dict(), "bytes": model.stat().st_size, "seconds": seconds}
        print(name, rows[name], file=sys.stderr)
    ended = sum(a[-1] in reference.stops for a in reference.answers)
    return {
        "reference": "PEFT adapter on its base, float32",
        "base_kl_per_token": reference.base_kl,
        "reference_ended_at_end_of_turn": ended,
        "tokens_per_answer": TOKENS,
        "rows": rows,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "xllamacpp")},
        "date": time.strftime("%Y-%m-%d"),
    }


def write_files(source, merged: Path, work: Path) -> dict[str, tuple[Path, Path | None]]:
    folded, base = work / "folded", work / "base"
    folded.mkdir()
    base.mkdir()
    fold_adapter(source, folded)
    write_config(source, base, "float32", tied=source.tied)
    write_tokenizer(source, base)
    (base / "model.safetensors").symlink_to(source.folder / "model.safetensors")
    f16, q8, q4 = (work / f"{n}.gguf" for n in ("f16", "q8", "q4"))
    base_file, adapter = work / "base.gguf", work / "adapter.gguf"
    orders = [
        Conversion(merged, f16, "F16", "tuned"),
        Conversion(merged, q8, "Q8_0", "tuned"),
        Conversion(base, base_file, "F16", "base"),
        Conversion(folded, adapter, "F32", "tuned", base),
    ]
    convert_all(orders, lambda text: print(text, file=sys.stderr), offline=False)
    quantize_gguf(f16, q4, "Q4_K_M")
    return {
        "GGUF F16 (llama.cpp)": (f16, None),
        "GGUF Q8_0 (llama.cpp)": (q8, None),
        "GGUF Q4_K_M (llama.cpp)": (q4, None),
        "GGUF F16 base + adapter (llama.cpp)": (base_file, adapter),
    }


if __name__ == "__main__":
    main()
