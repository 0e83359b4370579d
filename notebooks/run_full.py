"""A shape's name enters; the notebook's cells run on it in profile `full`; a JSON result leaves.

The gated download is replaced by random weights of that shape, written once as a model folder, and
the tokenizer by the demo's (the vocabulary grows to it where it is smaller). Every other cell is
the notebook's own, from its data to its export: nothing is written twice, no network is needed.

    python notebooks/run_full.py --shape llama-2-7b --method lora
    python notebooks/run_full.py --shape llama-2-7b --method qlora --parts Plan,Training
    python notebooks/run_full.py --shape smollm2-135m --layers 2 --method lora     # tries it out
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Cells between the headings; theory runs on the small model and needs no card.
PARTS = {
    "lora": ["Plan", "Training", "What training changed", "Evaluation", "Export"],
    "qlora": ["Plan", "Training", "Evaluation", "Export"],
}
BEFORE = ("Data", "The template")
AFTER = ("What training changed", "Evaluation", "Export")


def cells(method: str) -> list[tuple[str, set[str], str]]:
    """(heading, tags, source) of each code cell of the notebook as committed."""
    path = HERE / f"colab_{method}_finetune.ipynb"
    found, heading = [], ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        named = re.search(r"^## \d+ · (.+)$", text, re.MULTILINE)
        if cell["cell_type"] == "markdown" and named:
            heading = named[1]
        elif cell["cell_type"] == "code":
            found.append((heading, set(cell["metadata"].get("tags", [])), text))
    return found


def random_folder(shape: str, layers: int | None, tokenizer: Path, folder: Path) -> Path:
    """A model folder of this shape with random weights; made once."""
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoTokenizer

    from lorakit.hardware import detect_device
    from lorakit.model.random_init import random_model
    from lorakit.planning.known_models import shape_config

    made = folder.with_name(folder.name + ".part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(made)
    config = shape_config(shape)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.vocab_size = max(config.vocab_size, len(words))
    config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    config.pad_token_id = words.pad_token_id
    model = random_model(config, detect_device("auto"), four_bit=False)
    model.save_pretrained(made)
    made.rename(folder)
    return folder


def run_cell(source: str, names: dict[str, Any], number: int) -> None:
    """Execute one cell; a value on its last line is printed, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"<cell {number}>", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
        if value is not None:
            print(value)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the parts that are asked for, in the folder `work`; seconds and figures."""
    work = Path(asked.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = Path(asked.tokenizer).resolve() if asked.tokenizer else demo_folder()
    began = time.perf_counter()
    shape = f"{asked.shape}-{asked.layers}" if asked.layers else asked.shape
    model = random_folder(asked.shape, asked.layers, tokenizer, work / shape)
    seconds = {"random weights": round(time.perf_counter() - began, 1)}
    forget_peak()
    os.chdir(work)
    names: dict[str, Any] = {"__name__": "__main__"}
    not_met: list[str] = []
    for number, (heading, tags, source) in enumerate(cells(asked.method)):
        if heading not in (*BEFORE, *asked.parts) and "setting" not in tags:
            continue
        if {"theory", "machine"} & tags:
            continue
        if heading in AFTER and "run" not in names:
            names["run"] = trained(names)
        began = time.perf_counter()
        print(f"--- {time.strftime('%X')} {heading}, cell {number}", flush=True)
        try:
            run_cell(source, names, number)
        except AssertionError:  # that random weights learn is not promised: told, not the end
            not_met.append(f"{heading}, cell {number}")
        seconds[heading] = round(seconds.get(heading, 0) + time.perf_counter() - began, 1)
        if "PROFILE" in names and "OUTPUT" not in names:
            names |= {"PROFILE": "full", "MODEL": str(model), "OUTPUT": Path("runs")}
            names |= {"IN_COLAB": False, "pathlib": sys.modules["pathlib"], "shutil": shutil}
            names |= {"importlib": __import__("importlib.util")}
        if "settings" in names and asked.steps:
            names["settings"]["max_steps"] = asked.steps
    return {"seconds": seconds, "asserts_not_met": not_met, **figures_of(names)}


def forget_peak() -> None:
    """The cells' peak is asked for, not that of making weights."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def trained(names: dict[str, Any]) -> Any:
    """The run of an earlier call, for parts after training."""
    import lorakit

    return lorakit.open_run(names["OUTPUT"] / f"full-{names['METHOD']}")


def demo_folder() -> Path:
    """The tokenizer of `model: demo`."""
    from lorakit.model.demo_model import demo_model_dir

    return demo_model_dir()


def figures_of(names: dict[str, Any]) -> dict[str, Any]:
    """What the cells found, as numbers."""
    import torch

    found: dict[str, Any] = {}
    if "planned" in names:
        plan = names["planned"]
        found["planned_gib"] = round(plan.training.total_bytes / 2**30, 2)
        found["choices"] = plan.training.describe()
        found["trainable"], found["parameters"] = plan.trainable, plan.parameters
    if rows := [row for row in getattr(names.get("run"), "metrics", []) if row.get("loss")]:
        found |= {"steps": rows[-1]["step"], "loss": [rows[0]["loss"], rows[-1]["loss"]]}
        found["tokens_per_second"] = rows[-1]["tokens_per_second"]
        found["memory_gb"] = max(row["memory_gb"] for row in rows)
    if "result" in names:
        result = names["result"]
        found["held_out"] = {"base": result.base.loss, "tuned": result.tuned.loss}
    for name in ("merged", "ollama"):
        if name in names:
            found[name] = {k: v for k, v in names[name].items() if k != "path"}
    if torch.cuda.is_available():
        found["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    """Run, print the result, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--method", choices=("lora", "qlora"), required=True)
    parser.add_argument("--parts", help="headings, by commas; default all from Plan to Export")
    parser.add_argument("--steps", type=int, help="instead of the notebook's")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; default the demo's")
    parser.add_argument("--work", default="runs/full", help="models and runs are written here")
    parser.add_argument("--output", help="JSON result")
    asked = parser.parse_args()
    known = PARTS[asked.method]
    asked.parts = asked.parts.split(",") if asked.parts else known
    if unknown := [part for part in asked.parts if part not in known]:
        raise SystemExit(f"no part {', '.join(unknown)}; there are: {', '.join(known)}")
    output = Path(asked.output).resolve() if asked.output else None

    from lorakit.bench import provenance
    from lorakit.hardware import detect_device

    words = " ".join(sys.argv[1:])
    command = re.sub(r" --(output|tokenizer|work) \S+", "", f"python notebooks/run_full.py {words}")
    device = detect_device("auto")
    head = {"id": f"notebook-full-{asked.method}", "gpu": device.name, "shape": asked.shape}
    about = provenance(device, command)
    result = {**head, "layers": asked.layers, **run(asked), **about}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
