"""Runs killed at random moments and resumed unattended, against unbroken ones: bytes compared.

    python benchmarks/crash.py --out benchmarks/results/crash.json

Real runs of a tiny random model made here (two layers, byte tokens), each a forked child of this
process, which has the imports behind it: a trial takes a second or two. A child is killed by a
timer, or by itself at a random one of its file operations. tests/test_crash.py runs a share.
"""

import argparse
import collections
import contextlib
import gc
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.in_process import import_libraries

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHASES = (
    "starting",
    "tokenizing",
    "loading",
    "training",
    "saving",
    "rotating",
    "adapter",
    "evaluating",
)
ASIDE = None  # where caches and error texts of runs lie, if not beside them


# -- a model and data, made in code ---------------------------------------------------------------


def make_world(folder, width=64):
    """A random two-layer Llama with a byte tokenizer, and thirty rows."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": f"What is in box {i}?", "answer": f"{i % 7} blue balls" * (1 + i % 3)}
        for i in range(30)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)


def spec_of(number):
    """Settings of run `number`: every mix of method, packing and accumulation comes up."""
    rng = random.Random(number)
    method, packing, (micro, accumulation) = list(
        itertools.product(("lora", "qlora"), (True, False), ((2, 4), (4, 2), (8, 1)))
    )[number % 12]
    return {
        "method": method,
        "packing": packing,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "lora_dropout": 0.1,
        "lora_r": 4,
        "lora_alpha": 8,
        "cutoff_len": 128,
        "val_size": 2,
        "epochs": 3.0,  # 28 rows by 8: four steps each, the last one short
        "learning_rate": 5e-3,
        "lr_scheduler": rng.choice(["cosine", "linear", "constant"]),
        "gradient_checkpointing": rng.choice([True, False]),
        "save_every": rng.choice([1, 2, 3, 5]),
        "keep_checkpoints": rng.choice([1, 2, 3]),
        "seed": rng.randrange(1000),
    }


def resolve(world, folder, spec):
    from lorakit.recipe.loader import load_recipe

    model, rows = world
    flags = {"model": str(model), "data": str(rows), "output_dir": str(folder), "offline": True}
    return load_recipe(None, [], {**flags, **spec})


def cache_of(folder):
    return (ASIDE or folder.parent) / f"{folder.name}.cache"


def fault_of(folder):
    return (ASIDE or folder.parent) / f"{folder.name}.fault.txt"


# -- children -------------------------------------------------------------------------------------


class Phase:
    """What a child is doing, in memory shared with its parent."""

    def __init__(self):
        self.place = mmap.mmap(-1, 1)

    def __str__(self):
        return PHASES[self.place[0]]

    @contextlib.contextmanager
    def inside(self, name):
        before, self.place[0] = self.place[0], PHASES.index(name)
        yield
        self.place[0] = before

    def mark(self, owner, name, phase):
        """Let `owner.name` show `phase` while it runs."""
        plain = getattr(owner, name)

        def shown(*args, **kwargs):
            with self.inside(phase):
                return plain(*args, **kwargs)

        setattr(owner, name, shown)

    def mark_all(self):
        from lorakit import pipeline
        from lorakit.train import resumable_trainer

        self.mark(pipeline, "prepare_data", "tokenizing")
        self.mark(pipeline, "load_base", "loading")
        self.mark(pipeline.LoraTrainer, "train", "training")
        self.mark(pipeline.LoraTrainer, "_save_checkpoint", "saving")
        self.mark(resumable_trainer, "rotate", "rotating")
        self.mark(pipeline, "save_adapter", "adapter")
        self.mark(pipeline, "evaluate", "evaluating")


def start(world, folder, spec, phase, die_at=None, prepare=None, job=None):
    """Fork a child that trains into `folder`, from where it was; returns its process number.

    Args:
        job: what it does instead of training.
        die_at: the child kills itself before its file operation of this number.
        prepare: called in the child first.
    """
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        # Otherwise each collection visits the million objects of the parent's imports.
        gc.freeze()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        phase.place[0] = 0
        keep_cache_in(cache_of(folder))
        phase.mark_all()
        if prepare:
            prepare()
        if die_at is not None:
            die_at_operation(die_at, str(folder))
        code = (job or train)(world, folder, spec)
    except BaseException:
        fault_of(folder).write_text(traceback.format_exc())
    finally:
        os._exit(code)


def train(world, folder, spec):
    from rich.console import Console

    from lorakit.errors import LorakitError
    from lorakit.pipeline import fit

    try:
        resolved = resolve(world, folder, spec)
        return fit(resolved, Console(quiet=True), resume=folder.exists()).exit_code
    except LorakitError as error:
        fault_of(folder).write_text(str(error))
        return error.exit_code


def export(_world, folder, _spec):
    """Merge the run in `folder` into its export/merged."""
    from rich.console import Console

    from lorakit.export.exporters import export_run
    from lorakit.storage.run_dir import RunDir

    export_run(RunDir(folder), "merged", None, Console(quiet=True))
    return 0


def keep_cache_in(folder):
    from lorakit.data import cache

    cache.cache_home = lambda: folder


def die_at_operation(number, prefix):
    """Kill this process before its file operation `number` below `prefix` (names or bytes)."""
    count = itertools.count()

    def operation(path):
        if str(path).startswith(prefix) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and isinstance(args[1], str | None):
            if args[1] is None or set(args[1]) & set("wxa+"):
                operation(args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            operation(args[0])

    plain = os.fsync

    def fsync(handle):
        operation(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def end_of(process):
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# -- what must hold -------------------------------------------------------------------------------


def torn(folder):
    """Everything under `folder` that bears a final name and is not whole."""
    from lorakit.data import cache
    from lorakit.storage.atomic_dir import CorruptedError, verified
    from lorakit.storage.run_dir import RunDir

    run, found = RunDir(folder), []
    for place in [*run.list_checkpoints(), *([run.adapter] if run.adapter.exists() else [])]:
        try:
            verified(place)
        except CorruptedError as trouble:
            found.append(f"{place.name}: {trouble}")
    home = cache_of(folder)
    found += [
        f"cache {place.name}"
        for place in (home.glob("*.json") if home.exists() else ())
        if cache._intact(place.with_suffix(".arrow")) is None
    ]
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            found.append(path.name)
    return found


def result_of(folder):
    """All that must be equal, bytes and numbers, whatever happened on the way."""
    from lorakit.storage.run_dir import RunDir, read_metrics
    from lorakit.train.checkpoint import TENSORS, VALUES

    run = RunDir(folder)
    last = run.list_checkpoints()[-1]
    rows = [
        {k: row[k] for k in ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")}
        for row in read_metrics(run)
    ]
    return {
        "adapter": (run.adapter / "adapter_model.safetensors").read_bytes(),
        "checkpoint": (last / "adapter_model.safetensors").read_bytes(),
        "optimizer": (last / TENSORS).read_bytes(),
        "schedule and generators": (last / VALUES).read_bytes(),
        "last step": last.name,
        "metrics": rows,
    }


def steps_at_risk(folder):
    """(whole checkpoints, steps that were logged beyond the newest of them)."""
    from lorakit.storage.run_dir import RunDir, read_metrics
    from lorakit.train.checkpoint import newest_intact

    run = RunDir(folder)
    newest, notes = newest_intact(run)
    logged = max((row["step"] for row in read_metrics(run)), default=0)
    whole = len(run.list_checkpoints()) - len(notes)
    return whole, max(0, logged - (newest.step if newest else 0))


# -- the campaign ---------------------------------------------------------------------------------


class Campaign:
    """Runs, kills, and what came of them."""

    def __init__(self, place, seed):
        self.place, self.rng, self.phase = place, random.Random(seed), Phase()
        self.world = place / "world" / "model", place / "world" / "rows.jsonl"
        if not (process := os.fork()):
            make_world(place / "world")
            os._exit(0)
        assert end_of(process) == 0
        self.whole = {}
        self.kills = collections.Counter()
        self.failures, self.repeated, self.restarts = [], [], 0

    def unbroken(self, number):
        """The result and the seconds of run `number`, never killed; kept for the next call."""
        if number not in self.whole:
            folder = self.place / f"whole-{number}"
            began = time.monotonic()
            code = end_of(start(self.world, folder, spec_of(number), self.phase))
            if code:
                raise SystemExit(f"run {number} fails unkilled: {self.fault(folder)}")
            self.whole[number] = result_of(folder), time.monotonic() - began
        return self.whole[number]

    def broken(self, number, label, kills):
        """Run `number` into a folder of its own, killed `kills` times; notes what was wrong."""
        wanted, seconds = self.unbroken(number)
        spec, folder = spec_of(number), self.place / f"killed-{label}"
        had_one, done = False, 0
        while done < kills:
            code, where = self.once(folder, spec, seconds)
            if code == 0:
                if done == 0:  # it got away: the same again, from nothing
                    self.forget(folder)
                    continue
                break
            if code != -signal.SIGKILL:
                self.failures.append(f"{label}: exit {code} instead: {self.fault(folder)}")
                break
            done += 1
            self.kills[where] += 1
            self.check(folder, label, where, spec, had_one)
            had_one = had_one or steps_at_risk(folder)[0] > 0
        code = end_of(start(self.world, folder, spec, self.phase))
        if code:
            self.failures.append(f"{label}: not resumed, exit {code}: {self.fault(folder)}")
        else:
            found = result_of(folder)
            wrong = [key for key, value in wanted.items() if found[key] != value]
            if wrong:
                self.failures.append(f"{label}: differs in {', '.join(wrong)}")
        self.forget(folder)
        return done

    def exported(self, kills):
        """Kill exports of an unbroken run: the target is absent or whole, and the next one works.

        Returns:
            How many were killed.
        """
        from lorakit.storage.atomic_dir import CorruptedError, verified

        self.unbroken(0)
        folder, done = self.place / "whole-0", 0
        target = folder / "export" / "merged"
        for number in range(kills + 1):
            die_at = self.rng.randrange(30) if number < kills else None
            process = start(self.world, folder, {}, self.phase, die_at, job=export)
            code = end_of(process)
            done += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                self.failures.append(f"export {number}: exit {code}: {self.fault(folder)}")
            try:
                if target.exists():
                    verified(target)
                elif code == 0:
                    self.failures.append(f"export {number}: nothing there")
            except CorruptedError as trouble:
                self.failures.append(f"export {number}: torn: {trouble}")
            shutil.rmtree(target, ignore_errors=True)
        return done

    def once(self, folder, spec, seconds):
        """One child and its end: (exit code, what it was doing)."""
        if self.rng.random() < 0.5:
            die_at = int(self.rng.expovariate(1 / 80))
            process = start(self.world, folder, spec, self.phase, die_at)
        else:
            process = start(self.world, folder, spec, self.phase)
            time.sleep(self.rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return end_of(process), str(self.phase)

    def check(self, folder, label, where, spec, had_one):
        if found := torn(folder):
            self.failures.append(f"{label}: torn after a kill in {where}: {found}")
        if not folder.exists():
            return
        whole, at_risk = steps_at_risk(folder)
        if had_one and not whole:
            self.failures.append(f"{label}: no complete checkpoint after a kill in {where}")
        self.repeated.append(at_risk)
        # Between the last step of an interval and its checkpoint a kill costs the interval.
        if at_risk > spec["save_every"]:
            self.failures.append(f"{label}: {at_risk} steps lost, saved every {spec['save_every']}")

    def fault(self, folder):
        path = fault_of(folder)
        return path.read_text()[-1500:] if path.exists() else "nothing said"

    def forget(self, folder):
        for path in (folder, cache_of(folder)):
            shutil.rmtree(path, ignore_errors=True)
        fault_of(folder).unlink(missing_ok=True)


def import_everything():
    """What children need, loaded once; nothing here may start a thread."""
    import_libraries()
    import lorakit.pipeline  # noqa: F401
    from lorakit.console import quiet

    quiet(offline=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import_everything()
    from lorakit.bench import commit

    began, code = time.monotonic(), commit()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), args.seed)
        exports = campaign.exported(max(2, args.kills // 10))
        runs = done = 0
        while done < args.kills:
            done += campaign.broken(runs % 24, runs, args.kills_per_run)
            runs += 1
            print(f"{runs} runs, {done} kills, {len(campaign.failures)} failures", flush=True)
    spec = [spec_of(number) for number in range(24)]
    result = {
        "command": " ".join(["python", "benchmarks/crash.py", *sys.argv[1:]]),
        "runs": runs,
        "kills": done,
        "resumed_unattended_and_bit_identical": runs - len(campaign.failures),
        "failures": campaign.failures,
        "kills_while": dict(campaign.kills.most_common()),
        "exports_killed_and_absent_or_whole": exports,
        "steps_repeated": {
            "most": max(campaign.repeated, default=0),
            "mean": round(sum(campaign.repeated) / max(1, len(campaign.repeated)), 2),
        },
        "methods": dict(collections.Counter(s["method"] for s in spec)),
        "compared": "adapter, last checkpoint's adapter, optimizer, schedule, generators; metrics",
        "seconds": round(time.monotonic() - began, 1),
    }
    finish(result, args.out, code)


def finish(result, out, commit):
    """Print a result, and keep it with what is needed to repeat it."""
    import datetime
    import importlib.metadata

    names = ("lorakit", "torch", "transformers", "peft", "trl", "bitsandbytes", "safetensors")
    result["versions"] = {name: importlib.metadata.version(name) for name in names}
    result |= {"commit": commit, "date": datetime.date.today().isoformat()}
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
