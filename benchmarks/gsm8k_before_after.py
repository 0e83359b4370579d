"""Tune SmolLM2 on rows of GSM8K, and compare our scores with lm-eval's own model by document.

    python benchmarks/gsm8k_before_after.py GSM8K.jsonl --output results/gsm8k_before_after.json

GSM8K.jsonl has rows of {"question", "answer"}, such as GSM8K's train.jsonl. The first rows are
trained on; the last `--documents` rows are the test split of a task that includes lm-eval's own
gsm8k, with other data, shots and length of answers. `lorakit eval` runs on base and tuned; then
lm-eval's `hf` class runs the same task on the exported merged model and on the base, as by hand.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
from pathlib import Path

import lm_eval
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.evaluation import harness_tasks
from lorakit.evaluation.evaluate_run import EvalRequest, evaluate_run
from lorakit.export.exporters import export_run
from lorakit.model.demo_model import demo_model_dir
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import write_json, write_text

TASK = """\
include: {original}
task: gsm8k_local
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
num_fewshot: {shots}
generation_kwargs:
  {{until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, max_gen_toks: {tokens}}}
"""


def write_task(folder, rows, documents, shots, tokens):
    """lm-eval's gsm8k on local rows; returns the training rows."""
    train, test = rows[:-documents], rows[-documents:]
    for name, part in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    original = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    places = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    (folder / "task.yaml").write_text(
        TASK.format(original=original, shots=shots, tokens=tokens, **places)
    )
    return train


def by_hand(location, folder):
    """Scores by document of lm-eval's own class, as `lm-eval --model hf` runs it."""
    tokenizer = AutoTokenizer.from_pretrained(location)
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=["gsm8k_local"],
        task_manager=TaskManager(include_path=str(folder)),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    return {
        (sample["doc_id"], sample["filter"]): (sample["exact_match"], sample["resps"][0][0])
        for sample in found["samples"]["gsm8k_local"]
    }


def watch_ours(seen):
    """Keep the samples of each of our evaluations, in order: tuned, then base."""
    original = harness_tasks._rows_of

    def rows_of(name, task, samples):
        seen.append(
            {(s["doc_id"], s["filter"]): (s["exact_match"], s["resps"][0][0]) for s in samples}
        )
        return original(name, task, samples)

    harness_tasks._rows_of = rows_of


def recipe_dtype(run):
    return load_recipe(run.recipe).recipe.dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="examples a step")
    parser.add_argument("--tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=None, help="keep the files here")
    given = parser.parse_args()
    folder = given.work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()]
    train = write_task(folder, rows, given.documents, given.shots, given.tokens)[: given.train_rows]
    data = folder / "tuned_on.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                {"prompt": f"Question: {row['question']}\nAnswer:", "completion": row["answer"]}
            )
            + "\n"
            for row in train
        )
    )
    console = Console(stderr=True)
    recipe = {"model": "demo", "data": str(data), "output_dir": str(folder / "run"),
              "max_steps": given.steps, "gradient_accumulation_steps": given.batch,
              "learning_rate": 5e-4, "offline": True, "cutoff_len": 512, "val_size": 0}  # fmt: skip
    run = fit(load_recipe(recipe), console).run
    # Trained in the CPU's type; compared in float32, in which merging rounds no answer away.
    write_text(
        run.recipe,
        run.recipe.read_text().replace(f'dtype: "{recipe_dtype(run)}"', 'dtype: "float32"'),
    )
    seen = []
    watch_ours(seen)
    began = time.perf_counter()
    request = EvalRequest(tasks=("gsm8k_local",), include=(folder,), general=False)
    result, failed = evaluate_run(run, request, console)
    seconds = time.perf_counter() - began
    assert not failed, failed
    ours = dict(zip(("tuned", "base"), seen, strict=True))
    merged = export_run(run, "merged", folder / "merged", console, dtype="float32")
    places = {"tuned": folder / "merged", "base": demo_model_dir(None, True)}
    sides = {}
    for side, location in places.items():
        own = by_hand(str(location), folder)
        assert own.keys() == ours[side].keys()
        sides[side] = {
            "scores_equal": sum(own[k][0] == ours[side][k][0] for k in own),
            "answers_equal": sum(own[k][1] == ours[side][k][1] for k in own),
            "of": len(own),
            "by_hand": {
                name: sum(v[0] for (_, f), v in own.items() if f == name) / given.documents
                for name in ("strict-match", "flexible-extract")
            },
        }
    write_json(
        given.output,
        {
            "model": "SmolLM2-135M-Instruct",
            "task": "lm-eval gsm8k, local rows",
            "settings": {
                k: str(v)
                for k, v in vars(given).items()
                if k in ("documents", "train_rows", "batch", "shots", "steps", "tokens")
            },
            "scores": result.as_dict()["tasks"],
            "compared_by_document": sides,
            "merged_kl_per_token": merged["kl_per_token"],
            "eval_seconds": round(seconds, 1),
            "cpu": platform.processor() or platform.machine(),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "lm_eval")
            },
        },
    )
    print(given.output.read_text())


if __name__ == "__main__":
    main()
