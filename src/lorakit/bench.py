"""Measure tokens/s and peak memory of a recipe on this GPU with random weights.

Speed and memory do not depend on the values of the weights; the trainer is that of a real run. The
median excludes the first steps, in which kernels are chosen.
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

from lorakit.distributed.process_group import DistributedContext, init_distributed
from lorakit.hardware import MemoryCap, detect_device, measure_context
from lorakit.model.load import seed_everything
from lorakit.model.lora_config import add_adapter, count_parameters, resolve_targets
from lorakit.model.random_init import random_model
from lorakit.planning.known_models import shape_config
from lorakit.planning.multi_gpu import shared_device
from lorakit.planning.planner import plan_training
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.recipe.schema import PAIR_OBJECTIVES, Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.storage.units import GIB
from lorakit.train.progress import TrainingProgress
from lorakit.train.resume import environment
from lorakit.train.signals import StopRequest
from lorakit.train.trainer import LoraTrainer
from lorakit.train.training_args import check_training_settings
from lorakit.types import IGNORE, Device, Example, MemoryPlan, Origin

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
    """Run one measurement; ranks started by torchrun share each step.

    Args:
        lengths: "fixed": every example has exactly `seq` tokens, all of them trained. "mixed":
            lognormal lengths like those of instruction data (mean 275 tokens), 60% trained. The
            sequences of preference pairs have `seq` tokens each, half of them a common prompt.

    Returns:
        JSON-ready result: tokens_per_second (median over the timed steps), peak_allocated_gib
        (torch's allocator), peak_process_gib (the driver's count of this process on the GPU; the
        largest of all ranks), and everything needed to repeat it.
    """
    flags = {
        "model": shape,
        "data": "random tokens",
        "method": method,
        "cutoff_len": seq,
        "micro_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "memory_probe": False,  # the first step is a probe itself
    }
    meter = _Meter()  # before init_distributed, which makes a context and NCCL's buffers
    with init_distributed() as ranks:
        console = console if ranks.is_main else Console(quiet=True)
        job = _job(load_recipe(None, overrides, flags), lengths, ranks)
        model = _model(job)
        trainable, total = count_parameters(model)
        console.print(
            f"{shape} {method} on {ranks.world_size} x {job.device.name}: "
            f"{trainable:,} of {total:,} parameters train; {job.plan.describe()}"
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
    """Plan the measurement of a recipe whose model is the name of a shape."""
    device = shared_device(measure_context(detect_device(resolved.recipe.dtype)), ranks)
    config = shape_config(resolved.recipe.model)
    recipe = resolve_targets(resolved, config).recipe
    check_training_settings(recipe, device, recipe.max_steps or 1, held_out=False)
    plan = plan_training(recipe, config, device)
    return _Job(recipe, config, device, plan, lengths, ranks)


@dataclass(frozen=True, slots=True)
class _Job:
    """One measurement: recipe, model config, device and plan."""

    recipe: Recipe
    config: Any
    device: Device
    plan: MemoryPlan
    lengths: str
    ranks: DistributedContext


def _model(job: _Job) -> Any:
    """Make the model with equal random weights on every rank, since ranks may shard the base."""
    seed_everything(job.recipe.seed)
    placement = job.plan.placement
    if placement.shards > 1:
        job.ranks.wait_for_load_turn()
    MemoryCap(job.recipe.memory_limit_bytes, job.device)
    four_bit = job.recipe.method == "qlora"
    base = random_model(job.config, job.device, four_bit, placement.loaded_on_host)
    return add_adapter(base, job.recipe)


def _described(job: _Job, trainer: LoraTrainer) -> dict[str, Any]:
    """Describe the plan, and the code path of each part."""
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
        "graphs": trainer.runner.describe(),
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
        "reference_seconds": round(clock.reference_seconds, 2),
        "tokens_per_step": round(statistics.mean(clock.tokens)),
    }


def _train(model: Any, job: _Job, meter: _Meter, console: Console) -> tuple[_Clock, LoraTrainer]:
    """Train and return the clock and the trainer."""
    recipe = job.recipe
    count = (recipe.max_steps or 1) * recipe.examples_per_step
    vocabulary = job.config.get_text_config().vocab_size
    if recipe.objective in PAIR_OBJECTIVES:
        examples = random_pairs(count, recipe.cutoff_len, vocabulary)
    else:
        examples = _random_examples(count, recipe.cutoff_len, vocabulary, job.lengths)
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
        began = time.perf_counter()
        trainer.prepare_reference(resuming=False)
        clock.reference_seconds = time.perf_counter() - began
        trainer.train()
    return clock, trainer


def provenance(device: Device, command: str | None = None) -> dict[str, Any]:
    """Facts for repeating a result; set `command` if it was not run by `lorakit`."""
    return {
        "versions": {**environment(device)["versions"], "python": sys.version.split()[0]},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command or _command(gpus=1),
    }


def _random_examples(count: int, seq: int, vocabulary: int, lengths: str) -> list[Example]:
    import numpy as np

    generator = np.random.default_rng(0)
    examples = []
    for row in range(1, count + 1):
        size, prompt = seq, 1
        if lengths == "mixed":
            size = int(np.clip(generator.lognormal(5.3, 0.8), 16, seq))
            prompt = max(1, int(0.4 * size))
        ids = generator.integers(10, vocabulary - 10, size).tolist()
        labels = [IGNORE] * prompt + ids[prompt:]
        examples.append(Example(ids, labels, Origin("random", row)))
    return examples


def random_pairs(count: int, seq: int, vocabulary: int) -> list[Example]:
    """Preference pairs of random tokens: two sequences of `seq` tokens, half of them a prompt."""
    import numpy as np

    generator = np.random.default_rng(0)
    pairs, prompt = [], max(1, seq // 2)
    for row in range(1, count + 1):
        asked = generator.integers(10, vocabulary - 10, prompt).tolist()
        answers = generator.integers(10, vocabulary - 10, (2, seq - prompt)).tolist()
        ids = [token for answer in answers for token in (*asked, *answer)]
        labels = [label for answer in answers for label in (*[IGNORE] * prompt, *answer)]
        pairs.append(Example(ids, labels, Origin("random", row), second=seq))
    return pairs


def _word_tokenizer() -> Any:
    """Make a tokenizer for the trainer, which needs only its pad id for random ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")


class _Clock(TrainerCallback):
    """Seconds between the ends of optimizer steps, and the tokens of each step."""

    def __init__(self, device: Device, trainer: LoraTrainer) -> None:
        self.device, self.trainer = device, trainer
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.start = self.reference_seconds = 0.0

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
    """Peak bytes of RAM of this process so far, including pinned memory."""
    import psutil

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class _Meter:
    """Peak memory while open, by torch's allocator and of the process by the driver or OS."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.allocated = self.process = 0
        self.stop = threading.Event()
        # On a CPU the memory of the process counts completely, so nothing is subtracted.
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
        """Bytes used on the GPU by NVML (with contexts), or of this process' RAM on a CPU."""
        import torch

        if not self.cuda:
            import psutil

            return int(psutil.Process().memory_info().rss)
        try:
            return int(torch.cuda.device_memory_used(0))
        except Exception:  # without NVML ask the CUDA runtime, which needs a context
            free, total = torch.cuda.mem_get_info()
            return total - free


def _command(gpus: int) -> str:
    """Command that repeats this measurement, without `--output`."""
    arguments = sys.argv[1:] + (["--gpus", str(gpus)] if gpus > 1 else [])
    if "--output" in arguments:
        position = arguments.index("--output")
        arguments = arguments[:position] + arguments[position + 2 :]
    return " ".join(["lorakit", *arguments])


def commit() -> str | None:
    """Commit of the source tree, with `+` if it has changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
