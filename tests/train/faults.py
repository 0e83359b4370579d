"""Tiny training runs, and faults made in them on purpose: no memory, numbers that are none."""

import io
from dataclasses import replace

import torch
from rich.console import Console

from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_tokenizer
from lorakit.model.lora_config import add_adapter
from lorakit.planning.memory import plan_memory
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest
from lorakit.train.trainer import LoraTrainer
from lorakit.types import IGNORE, Example, Origin

CPU = detect_device("float32", prefer="cpu")
PETABYTE = 2**50


def examples(lengths, source="rows.jsonl"):
    """Random ids; all but the first two are trained."""
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 900, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        made.append(Example(ids, [IGNORE, IGNORE, *ids[2:]], Origin(source, i + 1)))
    return made


def trainer_of(model_dir, folder, rows, val=(), shards=1, **values):
    """A trainer of the tiny model in `folder`; what it says is read with `said`.

    Args:
        shards: GPUs over which the plan shards the base.
    """
    values = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "packing": False,
        **values,
    }
    recipe = Recipe(model=str(model_dir), data="d", **values)
    torch.manual_seed(0)
    model = add_adapter(load_base(recipe, str(model_dir), CPU), recipe)
    run = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(file=io.StringIO(), width=1000)
    plan = plan_memory(recipe, model.get_base_model().config, CPU)
    plan = replace(plan, placement=replace(plan.placement, shards=shards))
    return LoraTrainer(
        model,
        load_tokenizer(recipe, str(model_dir)),
        recipe,
        CPU,
        plan,
        run,
        rows,
        list(val),
        TrainingProgress(console, run, "cpu"),
        StopRequest(),
    )


def said(trainer):
    """All that the run printed."""
    return trainer.progress.console.file.getvalue()


def trained(trainer):
    """Bytes of each trained tensor and of the optimizer's state."""
    tensors = {n: p.data for n, p in trainer.model.named_parameters() if p.requires_grad}
    for i, state in enumerate(trainer.optimizer.state.values()):
        tensors |= {f"optimizer {i} {k}": v for k, v in state.items()}
    return {n: t.detach().cpu().numpy().tobytes() for n, t in tensors.items()}


def ask_for_a_petabyte():
    """What the allocator says to it is the real error."""
    torch.empty(PETABYTE, dtype=torch.uint8)


class Around:
    """A step runner that calls `work(runner, micro_batches, scale)` in place of the runner."""

    def __init__(self, runner, work):
        self.runner, self.work = runner, work

    def __call__(self, micro_batches, scale):
        return self.work(self.runner, micro_batches, scale)

    def __getattr__(self, name):
        return getattr(self.runner, name)


def memory_ends(trainer, fails, where="forward"):
    """Let a layer run out of memory where `fails(step, micro, hidden)` says so.

    Args:
        fails: of the step in the making and the micro-batch, both from 1, and the layer's input.
        where: "forward", or "backward", when the last micro-batch's gradients are half made.

    Returns:
        list that grows by the (step, micro) of each failure.
    """
    layer = trainer.model.get_base_model().get_decoder().layers[0]
    failures = []
    micro = 0

    def counted(own, *args):
        nonlocal micro
        micro = 0
        return own(*args)

    def hook(module, inputs, output):
        nonlocal micro
        micro += module.training
        at = (trainer.state.global_step + 1, micro)
        hidden = output[0] if isinstance(output, tuple) else output
        if not module.training or not fails(*at, hidden):
            return

        def end(*_):
            failures.append(at)
            ask_for_a_petabyte()

        if where == "forward":
            end()
        hidden.register_hook(end)

    trainer.runner = Around(trainer.runner, counted)
    layer.register_forward_hook(hook)
    return failures


def poison(trainer, steps, kind):
    """Make the loss or the gradient of some steps NaN, infinite or huge.

    Args:
        steps: numbers from 1.
        kind: "loss nan", "loss inf", "gradient nan", "gradient inf" or "gradient spike".
    """
    place, value = kind.split()
    factor = {"nan": float("nan"), "inf": float("inf"), "spike": 1e4}[value]

    def poisoned(own, micro_batches, scale):
        loss = own(micro_batches, scale)
        if trainer.state.global_step + 1 not in steps:
            return loss
        if place == "loss":
            return loss * factor
        tensors = [p for p in trainer.model.parameters() if p.grad is not None]
        for tensor in tensors if value == "spike" else tensors[1:2]:
            tensor.grad.mul_(factor) if value == "spike" else tensor.grad.view(-1)[:1].fill_(factor)
        return loss

    trainer.runner = Around(trainer.runner, poisoned)


def nan_where(model, ids):
    """Let the embedding give NaN for these token ids; returns the hook."""

    def hook(module, inputs, output):
        return output.masked_fill(torch.isin(inputs[0], torch.tensor(ids)).unsqueeze(-1), torch.nan)

    return model.get_input_embeddings().register_forward_hook(hook)
