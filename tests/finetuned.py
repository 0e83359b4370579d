"""Runs of `lorakit.finetune` on a tiny model and twelve rows, and whether two are the same."""

import torch
from rich.console import Console
from safetensors.torch import load_file

import lorakit

ROWS = [{"question": f"What color is box {i}?", "answer": "It is red."} for i in range(12)]
PLAIN = {"max_steps": 1, "val_size": 2, "cutoff_len": 64, "lora_r": 4, "micro_batch_size": 2}


def trainer_in(folder, model_dir):
    """`train(name, **given)`: a run in `folder` with these arguments of `finetune`."""

    def train(name="run", model=str(model_dir), settings=PLAIN, **given):
        given = {"train_dataset": ROWS, **settings, **given}
        return lorakit.finetune(
            model=model, output_dir=str(folder / name), console=Console(quiet=True), **given
        )

    return train


def adapter(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(one, other):
    mine, theirs = adapter(one), adapter(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
