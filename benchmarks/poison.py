"""A hundred poisoned runs: what becomes of NaN, infinity and spikes in loss, gradient and data.

    python benchmarks/poison.py --out benchmarks/results/poison.json

Each run is a whole one (`fit`) of a tiny random model, with dropout, and has a poison of one kind
at steps or in rows drawn from its number. tests/train/test_poison.py runs seven of them.
"""

import argparse
import collections
import importlib.util
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.train.faults import Around

STEPS = 8
# A spike is one against the median of 20 steps at least.
SPIKE_STEPS = range(22, 29)
KINDS = (
    "loss nan",
    "loss inf",
    "gradient nan",
    "gradient inf",
    "gradient spike",
    "data nan",
    "data inf",
)


def poisoned_run(number, model_dir, data, folder):
    """One run, and all that it did; what must hold is in `judge`."""
    from lorakit.errors import WorkError
    from lorakit.pipeline import fit
    from lorakit.recipe.loader import load_recipe
    from lorakit.train.trainer import LoraTrainer

    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    spike = kind.endswith("spike")
    possible = SPIKE_STEPS if spike else range(1, STEPS + 1)
    steps = set(draw.sample(possible, draw.choice([1, 1, 2, 3])))
    flags = {
        "model": str(model_dir),
        "data": str(data),
        "output_dir": str(folder),
        "micro_batch_size": draw.choice([1, 2, 4]),
        "gradient_accumulation_steps": 2,
        "max_steps": possible[-1],
        "learning_rate": 2e-2,
        "lora_dropout": 0.1,
        "packing": draw.random() < 0.5,
        "save_every": draw.choice([1, 3, 100]),
        "val_size": 0,
        "cutoff_len": 128,
        "dtype": "float32",
        "offline": True,
    }
    made = []

    class Poisoned(LoraTrainer):
        """The trainer, with a poison, and a look at the weights around each step."""

        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.rows_of, self.weights_of, self.bad = {}, {0: weights_of(self)}, set()
            self.spikes = sorted(steps) if spike else []
            if kind.startswith("data"):
                rows = random.Random(number).sample(range(len(self.train_rows)), len(steps))
                self.tokens = [own_token(self.train_rows, row) for row in rows]
                value = float(kind.split()[1])
                hook = poison_embedding(self.tokens, value)
                self.model.get_input_embeddings().register_forward_hook(hook)

            self.runner = Around(self.runner, self.poisoned)

        def training_step(self, model, inputs, *rest, **more):
            examples = inputs["ready"]().own.examples
            self.rows_of[self.state.global_step + 1] = {e.origin.row for e in examples}
            return super().training_step(model, inputs, *rest, **more)

        def poisoned(self, runner, micro_batches, scale):
            now = self.state.global_step + 1
            loss = runner(micro_batches, scale)
            if not kind.startswith("data") and now in steps:
                loss = poison(kind, self.model, loss)
            norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
            if not all(torch.isfinite(x) for x in [loss, *norms]):
                self.bad.add(now)
            return loss

        def _maybe_log_save_evaluate(self, *args, **kwargs):
            self.weights_of[self.state.global_step] = weights_of(self)
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    console, stopped = Console(file=io.StringIO(), width=2000), None
    import lorakit.pipeline as stage

    own, stage.LoraTrainer = stage.LoraTrainer, Poisoned
    try:
        fit(load_recipe(None, [], flags), console)
    except WorkError as error:
        stopped = error
    finally:
        stage.LoraTrainer = own
    return judge(kind, made[0], stopped, console.file.getvalue(), folder)


def judge(kind, trainer, stopped, said, folder):
    """The figures of one run: what was applied, saved and named."""
    from lorakit.storage.run_dir import RunDir
    from lorakit.train.checkpoint import newest_intact

    done, bad = trainer.state.global_step, sorted(trainer.bad)
    applied = [s for s in bad if s <= done and trainer.weights_of[s] != trainer.weights_of[s - 1]]
    if stopped is not None and weights_of(trainer) != trainer.weights_of[done]:
        applied.append(done + 1)
    told = said + (stopped.message if stopped else "")

    def named(step):
        line = next((x for x in told.splitlines() if x.strip().startswith(f"step {step}: ")), "")
        rows = {int(x) for x in re.findall(r"\d+", line.partition(".jsonl: ")[2].split(";")[0])}
        return bool(rows) and rows <= trainer.rows_of[step]

    run = RunDir(folder)
    files = [f / "adapter_model.safetensors" for f in [run.adapter, *run.list_checkpoints()]]
    saved = [load_file(f) for f in files if f.exists()]
    broken = [w for w in saved if not all(torch.isfinite(t).all() for t in w.values())]
    whole = newest_intact(run)[0]
    return {
        "kind": kind,
        "end": "stopped" if stopped else "finished",
        "bad_steps": len(bad),
        "bad_updates_applied": len(applied),
        "bad_adapters_saved": len(broken),
        "bad_steps_named": sum(map(named, bad)),
        "spikes": len(trainer.spikes),
        "spikes_named": sum(map(named, trainer.spikes)),
        "adapter_after_stop": bool(stopped) and run.has_adapter(),
        "checkpoint_kept": not run.list_checkpoints() or whole is not None,
        "stopped_at_second": stopped is None or len(bad) == 2,
        "went_on_after_one": stopped is not None
        or (len(bad) <= 1 and done == trainer.state.max_steps),
    }


def weights_of(trainer):
    """Bytes of all that trains."""
    return b"".join(
        p.detach().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad
    )


def own_token(rows, number):
    """A token of this row that as few others as possible have."""
    counts = collections.Counter(t for row in rows for t in set(row.input_ids))
    return min(rows[number].input_ids[:-1], key=lambda t: (counts[t], t))


def poison_embedding(tokens, value):
    def hook(module, inputs, output):
        there = torch.isin(inputs[0], torch.tensor(tokens)).unsqueeze(-1)
        return output.masked_fill(there, value)

    return hook


def poison(kind, model, loss):
    """The loss of a step, or its gradients, made bad."""
    place, what = kind.split()
    if place == "loss":
        return loss * float(what)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if what == "spike":
        for grad in grads:
            grad.mul_(1e4)
    else:
        grads[-1].view(-1)[0] = float(what)
    return loss


def campaign(model_dir, data, folder, numbers):
    """The figures of these runs."""
    return [poisoned_run(n, model_dir, data, folder / f"run-{n}") for n in numbers]


def summary(runs):
    """Totals, and how each kind ended."""
    ends = collections.defaultdict(collections.Counter)
    for run in runs:
        ends[run["kind"]][run["end"]] += 1
    sums = ("bad_steps", "bad_steps_named", "spikes", "spikes_named")
    sums += ("bad_updates_applied", "bad_adapters_saved")
    return {
        "runs": len(runs),
        **{name: sum(r[name] for r in runs) for name in sums},
        "adapters_saved_by_stopped_runs": sum(r["adapter_after_stop"] for r in runs),
        "runs_without_whole_checkpoint": sum(not r["checkpoint_kept"] for r in runs),
        "stopped_other_than_at_the_second": sum(not r["stopped_at_second"] for r in runs),
        "ended_by_less_than_two": sum(not r["went_on_after_one"] for r in runs),
        "ends": {kind: dict(sorted(c.items())) for kind, c in sorted(ends.items())},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from lorakit.bench import provenance
    from lorakit.data import cache
    from lorakit.model.demo_model import demo_model_dir

    transformers_logging.disable_progress_bar()
    path = Path(__file__).parents[1] / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache.cache_home = lambda: folder / "prepared"
        tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
        model_dir = tests.make_tiny_model(tokenizer, folder / "model")
        data = tests.make_tiny_data(folder / "colors.jsonl")
        began = time.perf_counter()
        runs = campaign(model_dir, data, folder, range(args.runs))
    from lorakit.hardware import detect_device

    result = {
        **summary(runs),
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(detect_device("float32", prefer="cpu"), "python benchmarks/poison.py"),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
