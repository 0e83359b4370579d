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
from importlib.metadata import version
from pathlib import Path

import torch

from lorakit.export import llama_cpp
from lorakit.export.adapter import fold_adapter
from lorakit.export.gguf import compare_output, end_of_turn
from lorakit.export.gguf_convert import Conversion, convert_all
from lorakit.export.gguf_quantize import quantize_gguf
from lorakit.export.hf_files import write_config, write_tokenizer
from lorakit.export.merge_weights import write_merged
from lorakit.export.tuned_run import float32_model, open_source
from lorakit.export.verify_outputs import agreement, greedy, make_reference
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.storage.run_dir import find_run

TOP = 512
SWITCHES = 20


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--prompts", type=int, default=50)
    words.add_argument("--tokens", type=int, default=24, help="longest answer")
    words.add_argument("--other", type=Path, help="another run on the same base, to switch to")
    words.add_argument("--output", type=Path, default=None)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-engines-") as folder:
        result = measure(open_source(find_run(asked.run)), Path(folder), asked)
    if asked.other:
        result["switch_milliseconds"] = switch_milliseconds(asked.run, asked.other)
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if asked.output:
        asked.output.write_text(text)


def switch_milliseconds(run: Path, other: Path) -> list[float]:
    """Of each switch from one run's adapter to another's on a loaded base, and back."""
    several = MultiAdapterModel.of(find_run(run), (find_run(other),))
    names, found = list(several.tuned), []
    for number in range(SWITCHES):
        began = time.perf_counter()
        several.switch(names[(number + 1) % 2])
        found.append(round(1e3 * (time.perf_counter() - began), 2))
    return found


def measure(source, work: Path, asked: argparse.Namespace) -> dict:
    reference = make_reference(source, float32_model(source), asked.prompts, asked.tokens)
    rows = {}
    merged = work / "merged"
    merged.mkdir()
    write_merged(source, merged, "trained", "float32")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    rows["merged (transformers)"] = agreement(reference, plain, "merged").as_dict()
    again = greedy(plain, reference.prompts, asked.tokens, reference.stops)
    rows["merged (transformers)"]["ended_at_end_of_turn"] = count_ended(again, reference.stops)
    del plain
    files = write_files(source, merged, work)
    for name, (model, adapter) in files.items():
        began = time.perf_counter()
        adapter = adapter and str(adapter)
        asks = reference.prompts, reference.answers, end_of_turn(source)
        task = llama_cpp.Task(str(model), *asks, adapter, top=TOP)
        (heard,) = llama_cpp.run_tasks([task])
        found = compare_output(source, reference, heard)
        seconds = round(time.perf_counter() - began, 1)
        rows[name] = {**found.as_dict(), "bytes": model.stat().st_size, "seconds": seconds}
        print(name, rows[name], file=sys.stderr)
    return {
        "reference": "PEFT adapter on its base, float32",
        "base_kl_per_token": reference.base_kl,
        "reference_ended_at_end_of_turn": count_ended(reference.answers, reference.stops),
        "tokens_per_answer": asked.tokens,
        "rows": rows,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "xllamacpp")},
        "date": time.strftime("%Y-%m-%d"),
    }


def count_ended(answers, stops) -> int:
    return sum(a[-1] in stops for a in answers)


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
