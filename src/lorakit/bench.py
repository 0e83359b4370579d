"""A shape and a method enter; what this card does with the recipe leaves: tokens/s and peak memory.

The model has random weights (speed and memory do not depend on their values) and goes through the
same trainer as a real run. The median leaves out the first steps: kernels are chosen there.
"""

from __future__ import annotations

import datetime
import gc
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lorakit.distributed.process_group import DistributedContext, init_distributed, shared_device
from lorakit.hardware import MemoryCap, detect_device, measure_context
from lorakit.model.load import seed_everything
from lorakit.model.lora_config import add_adapter, count_parameters, resolve_targets
from lorakit.model.random_init import random_model
from lorakit.planning.known_models import shape_config
from lorakit.planning.planner import plan_training
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.progress import TrainingProgress
from lorakit.train.resume import environment
from lorakit.train.signals import StopRequest
from lorakit.train.trainer import LoraTrainer
from lorakit.types import IGNORE, Device, Example, MemoryPlan, Origin

GIB = 2**30
SAMPLE_SECONDS = 0.01
# Kernels are chosen and caches filled in the first steps.
UNTIMED_STEPS = 3


def run_bench(
    shape: str,
    method: str,
    seq: int,
    micro_batch: int | None,
    accumulation: int | None,
    steps: int,
    overrides: Sequence[str],
    label: str | None,
    console: Console,
    lengths: str = "fixed",
) -> dict[str, Any]:
    """Measure one row; where torchrun started several processes, they share each step.

    Args:
        lengths: "fixed": every example is exactly `seq` tokens, all of them trained. "mixed":
            lognormal lengths like those of instruction data (mean 275 tokens), 60% trained.

    Returns:
        JSON-ready result: tokens_per_second (median over the timed steps), peak_allocated_gib
        (torch's allocator), peak_process_gib (the driver's figure for the card, this process'
        share; the largest of all ranks), and everything needed to repeat it.
    """
    flags = {
        "model": shape,
        "data": "random tokens",
        "method": method,
        "cutoff_len": seq,
        "micro_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "memory_probe": False,  # the first step is one
    }
    meter = _Meter()  # before the ranks meet, which makes a context and NCCL's buffers
    with init_distributed() as ranks:
        console = console if ranks.is_main else Console(quiet=True)
        job = _job(load_recipe(None, overrides, flags), lengths, ranks)
        model = _model(job)
        trainable, total = count_parameters(model)
        console.print(
            f"{shape} {method} on {ranks.world_size} x {job.device.name}: {trainable:,} of {total:,} "
            f"parameters train; {job.plan.describe()}"
        )
        clock, trainer = _train(model, job, meter, console)
        measured = ranks.all_gather_object(_measured(clock, meter))
    return {
        "id": label,
        "shape": shape,
        "trainable_parameters": trainable,
        "seq": seq,
        "gpus": ranks.world_size,
        **measured[0],
        **{key: max(m[key] for m in measured) for key in measured[0] if key.startswith("peak")},
        **_described(job, trainer),
        **provenance(job.device, _command(ranks.world_size)),
    }


def _job(resolved: ResolvedRecipe, lengths: str, ranks: DistributedContext) -> _Job:
    """The recipe's model is a shape's name."""
    device = shared_device(measure_context(detect_device(resolved.recipe.dtype)), ranks)
    config = shape_config(resolved.recipe.model)
    recipe = resolve_targets(resolved, config).recipe
    plan = plan_training(recipe, config, device)
    return _Job(recipe, config, device, plan, lengths, ranks)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is measured."""

    recipe: Recipe
    config: Any
    device: Device
    plan: MemoryPlan
    lengths: str
    ranks: DistributedContext


def _model(job: _Job) -> Any:
    """Random weights, the same on every rank: each may hold a part of one base."""
    seed_everything(job.recipe.seed)
    placement = job.plan.placement
    if placement.shards > 1:
        job.ranks.wait_for_load_turn()
    MemoryCap(job.recipe.memory_limit_bytes, job.device)
    four_bit = job.recipe.method == "qlora"
    base = random_model(job.config, job.device, four_bit, placement.base_offloaded)
    return add_adapter(base, job.recipe)


def _described(job: _Job, trainer: LoraTrainer) -> dict[str, Any]:
    """What was planned, and which path each part took."""
    return {
        "device": job.device.kind,
        "gpu": job.device.name,
        "method": job.recipe.method,
        "lengths": job.lengths,
        "planned_gib": round(job.plan.total_bytes / GIB, 3),
        "planned_parts": job.plan.parts,
        "plan": job.plan.describe(),
        "placement": asdict(job.plan.placement),
        "keep": list(job.plan.keep),
        "layers": trainer.attached.layers,
        "loss": trainer.attached.loss,
        "graphs": trainer.describe_graphs(),
        "recipe": job.recipe.model_dump(mode="json", exclude={"model", "data", "output_dir"}),
    }


def _measured(clock: _Clock, meter: _Meter) -> dict[str, Any]:
    timed = slice(min(UNTIMED_STEPS, len(clock.seconds) // 2), None)
    rates = [n / s for n, s in zip(clock.tokens[timed], clock.seconds[timed], strict=True)]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "peak_allocated_gib": round(meter.allocated / GIB, 3),
        "peak_process_gib": round(meter.process / GIB, 3),
        "peak_host_gib": round(host_peak() / GIB, 3),
        "step_seconds": [round(s, 4) for s in clock.seconds],
        "tokens_per_step": round(statistics.mean(clock.tokens)),
    }


def _train(model: Any, job: _Job, meter: _Meter, console: Console) -> tuple[_Clock, LoraTrainer]:
    """The clock after the last step, and the trainer that ran."""
    recipe = job.recipe
    count = (recipe.max_steps or 1) * recipe.examples_per_step
    examples = _random_examples(count, recipe.cutoff_len, job.config.vocab_size, job.lengths)
    with tempfile.TemporaryDirectory() as folder, meter:
        run = RunDir(Path(folder))
        trainer = LoraTrainer(
            model,
            _word_tokenizer(),
            recipe,
            job.device,
            job.plan,
            run,
            examples,
            [],
            TrainingProgress(console, run, job.device.kind),
            StopRequest(),
            ranks=job.ranks,
        )
        clock = _Clock(job.device, trainer)
        trainer.add_callback(clock)
        trainer.args.save_strategy = "no"
        trainer.train()
    return clock, trainer


def provenance(device: Device, command: str | None = None) -> dict[str, Any]:
    """What a result needs to be repeated; `command` where it was not `lorakit` that ran."""
    return {
        "versions": {**environment(device)["versions"], "python": sys.version.split()[0]},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command or _command(gpus=1),
    }


def _random_examples(count: int, seq: int, vocabulary: int, lengths: str) -> list[Example]:
    import numpy as np

    generator = np.random.default_rng(0)
    made = []
    for number in range(1, count + 1):
        size, prompt = seq, 1
        if lengths == "mixed":
            size = int(np.clip(generator.lognormal(5.3, 0.8), 16, seq))
            prompt = max(1, int(0.4 * size))
        ids = generator.integers(10, vocabulary - 10, size).tolist()
        labels = [IGNORE] * prompt + ids[prompt:]
        made.append(Example(ids, labels, Origin("random", number)))
    return made


def _word_tokenizer() -> Any:
    """The trainer wants a tokenizer of transformers' kind; random ids need only its pad id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


class _Clock(TrainerCallback):
    """Wall-clock seconds from one optimizer step's end to the next one's, and its tokens."""

    def __init__(self, device: Device, trainer: LoraTrainer) -> None:
        self.device, self.trainer = device, trainer
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.seconds:
            self._wait()
            self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._wait()
        end = time.perf_counter()
        self.seconds.append(end - self.start)
        self.start = end
        self.tokens.append(self.trainer.step_tokens)

    def _wait(self) -> None:
        if self.device.kind == "cuda":
            import torch

            torch.cuda.synchronize()


def host_peak() -> int:
    """Most bytes of RAM this process has held so far, page-locked ones included."""
    import psutil

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class _Meter:
    """Peak memory while open: torch's allocator, and the process as driver or OS see it."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.allocated = self.process = 0
        self.stop = threading.Event()
        # A CPU run's own figure is the whole process; nothing is subtracted.
        self.before = self._used() if self.cuda else 0

    def __enter__(self) -> _Meter:
        if self.cuda:
            import torch

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.cuda:
            import torch

            self.allocated = torch.cuda.max_memory_allocated()
        else:
            self.allocated = self.process

    def _sample(self) -> None:
        while not self.stop.is_set():
            self.process = max(self.process, self._used() - self.before)
            self.stop.wait(SAMPLE_SECONDS)

    def _used(self) -> int:
        """Bytes in use: of the whole card by NVML (context included), or of this process' RAM."""
        import torch

        if not self.cuda:
            import psutil

            return int(psutil.Process().memory_info().rss)
        try:
            return int(torch.cuda.device_memory_used(0))
        except Exception:  # no NVML here: the runtime's figure, which needs a context first
            free, total = torch.cuda.mem_get_info()
            return total - free


def _command(gpus: int) -> str:
    """What to type to repeat this row, without the place the result was written to."""
    words = sys.argv[1:] + (["--gpus", str(gpus)] if gpus > 1 else [])
    if "--output" in words:
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    return " ".join(["lorakit", *words])


def commit() -> str | None:
    """Commit of the source tree, with `+` when it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
