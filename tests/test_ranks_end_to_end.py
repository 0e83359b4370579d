"""Two processes share each step: the numbers of one, and no hang where one of them ends."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from lorakit.finetune import fit
from rich.console import Console
from safetensors.torch import load_file

from lorakit.recipe_file import load_recipe
from lorakit.run_dir import ADAPTER_WEIGHTS, RunDir, read_metrics

PLAIN = {
    "dtype": "float32",
    "lora_dropout": 0.0,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "save_every": 3,
}


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe, tiny_model_dir, tiny_data, tmp_path_factory):
    def write(**values):
        folder = tmp_path_factory.mktemp("ranks")
        run = folder / "run"
        resolved = tiny_recipe(tiny_model_dir, tiny_data, run, **PLAIN | values)
        path = folder / "recipe.yaml"
        path.write_text(resolved.to_yaml())
        return path, RunDir(run)

    return write


def command(*words, gpus=1):
    gpus = ("--gpus", str(gpus)) if gpus > 1 else ()
    return [sys.executable, "-m", "lorakit", "train", *map(str, words), *gpus, "--offline"]


def environment():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def train(*words, gpus=1, code=0):
    done = subprocess.run(
        command(*words, gpus=gpus), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def adapter(run):
    return load_file(run.adapter / ADAPTER_WEIGHTS)


def same(one, other):
    assert losses(one) == pytest.approx(losses(other), abs=1e-5, rel=0)
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-5), name


# How two ranks work, and the single process whose numbers they must have.
WAYS = {
    "as one": ({}, {}),
    "packed": ({"packing": True, "micro_batch_size": 4, "gradient_accumulation_steps": 2}, {}),
    "sharded": ({"engine": "on", "sharding": "on"}, {"engine": "on", "streaming": "on"}),
    "4-bit": (
        {"engine": "on", "sharding": "on", "method": "qlora"},
        {"engine": "on", "streaming": "on", "method": "qlora"},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_have_the_numbers_of_one(recipe_file, way):
    shared_file, shared = recipe_file(**WAYS[way][0])
    alone_file, alone = recipe_file(**WAYS[way][1])
    fit(load_recipe(alone_file), Console(quiet=True))
    train(shared_file, gpus=2)
    same(shared, alone)


class Running:
    """A run of two ranks in the background."""

    def __init__(self, *words):
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command(*words, gpus=2), env=environment(), stderr=subprocess.PIPE, text=True
        )

    def at_step(self, run, step):
        while len(losses(run)) < step:
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.1)
        return self

    def rank(self, number):
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child.pid
        raise AssertionError(f"no rank {number}")

    def ended(self):
        _, said = self.process.communicate(timeout=120)
        return said


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_and_the_run_resumes(recipe_file, fault):
    path, run = recipe_file(max_steps=2000, save_every=2)
    running = Running(path).at_step(run, 5)
    victim, since = running.rank(1), time.monotonic()
    os.kill(victim, fault)
    said = running.ended()
    print(said, time.monotonic() - since)
    assert running.process.returncode != 0
    assert "rank 1 (cpu:1 on" in said
    assert f"process {victim}" in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert run.list_checkpoints()
    assert not psutil.pid_exists(victim)
    last = len(losses(run))
    train(path, "--resume", "--set", f"max_steps={last + 3}")
    assert losses(run)[-1] is not None


def test_a_signal_to_the_launcher_saves_and_stops_all(recipe_file):
    path, run = recipe_file(max_steps=2000, save_every=500)
    running = Running(path).at_step(run, 3)
    running.process.send_signal(signal.SIGTERM)
    said = running.ended()
    print(said)
    assert running.process.returncode == 128 + signal.SIGTERM
    assert len(run.list_checkpoints()) == 1
    assert "Traceback" not in said
