"""Two processes share each step: the numbers of one, and no hang where one of them ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.fit import fit
from lorakit.recipe_file import load_recipe
from lorakit.run_dir import ADAPTER_WEIGHTS, RunDir, read_metrics
from lorakit.train.checkpoint import checkpoint_step

QUIET = Console(quiet=True, stderr=True)

PLAIN = {
    "dtype": "float32",
    "lora_dropout": 0.0,
    "max_steps": 6,  # 26 rows by 8: the fourth step is short
    "learning_rate": 5e-3,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_every": 3,
}
SHARDED = {"method": "qlora", "engine": "on", "sharding": "on"}
STREAMED = {"method": "qlora", "engine": "on", "streaming": "on"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty rows of so different lengths that packing pays."""
    path = tmp_path_factory.mktemp("ranks-data") / "rows.jsonl"
    rows = [
        {
            "question": f"What color is box {i}?",
            "answer": "It is " + "very " * (7 * i % 23) + "red.",
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe, tiny_model_dir, data, tmp_path_factory):
    def write(**values):
        folder = tmp_path_factory.mktemp("ranks")
        run = folder / "run"
        resolved = tiny_recipe(tiny_model_dir, data, run, **PLAIN | values)
        path = folder / "recipe.yaml"
        path.write_text(resolved.to_yaml())
        return path, RunDir(run)

    return write


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have it: more threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(recipe_file):
    path, run = recipe_file()
    return run, train(path, gpus=2)


@pytest.fixture(scope="module")
def alone(recipe_file):
    torch.set_num_threads(1)
    path, run = recipe_file()
    fit(load_recipe(path), QUIET)
    return run


def command(*words, gpus=1):
    gpus = ("--gpus", str(gpus)) if gpus > 1 else ()
    return [sys.executable, "-m", "lorakit", "train", *map(str, words), *gpus, "--offline"]


def environment():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def train(*words, gpus=1):
    done = subprocess.run(
        command(*words, gpus=gpus), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def same(one, other):
    """The curve, the held-out loss and the adapter, in form and numbers."""
    assert losses(one) == pytest.approx(losses(other), abs=1e-5, rel=0)
    scores = [json.loads(run.eval.read_text())["tuned"] for run in (one, other)]
    assert scores[0]["tokens"] == scores[1]["tokens"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)
    mine, theirs = (load_file(run.adapter / ADAPTER_WEIGHTS) for run in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-5), name
    files = [sorted(p.name for p in run.adapter.iterdir()) for run in (one, other)]
    assert files[0] == files[1]


def from_step_3(run, folder):
    """A copy of a finished run as it was after its first checkpoint."""
    copy = RunDir(folder / "run")
    shutil.copytree(run.path, copy.path)
    shutil.rmtree(copy.checkpoint(6))
    shutil.rmtree(copy.adapter)
    return copy


def test_two_ranks_have_the_numbers_of_one(shared, alone):
    run, said = shared
    assert "ranks    2 share each step" in said
    assert "packing  on" in said
    same(run, alone)


def test_a_run_of_two_goes_on_alone(shared, alone, tmp_path):
    run = from_step_3(shared[0], tmp_path)
    said = io.StringIO()
    fit(load_recipe(run.recipe), Console(file=said, width=300), resume=True)
    assert "2 ranks before, 1 now" in said.getvalue()
    same(run, alone)


def test_a_run_of_one_goes_on_with_two(alone, tmp_path):
    run = from_step_3(alone, tmp_path)
    assert "1 rank before, 2 now" in train(run.recipe, "--resume", gpus=2)
    same(run, alone)


def test_a_base_spread_over_ranks_computes_as_one_that_is_streamed(recipe_file):
    path, run = recipe_file(**SHARDED)
    streamed, whole = recipe_file(**STREAMED)
    fit(load_recipe(streamed), QUIET)
    assert "spread over 2" in train(path, gpus=2)
    assert json.loads(run.plan.read_text())["placement"]["shards"] == 2
    same(run, whole)


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
    path, run = recipe_file(max_steps=5000, save_every=2, val_size=0, lora_dropout=0.1)
    running = Running(path).at_step(run, 5)
    victim, since = running.rank(1), time.monotonic()
    os.kill(victim, fault)
    said = running.ended()
    assert time.monotonic() - since < 60
    assert running.process.returncode == 1
    assert "rank 1 (cpu:1 on" in said
    assert f"process {victim}" in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert not psutil.pid_exists(victim)
    assert (run.path / "stacks_rank0.txt").exists()
    taken = len(losses(run))
    fit(load_recipe(path, [f"max_steps={taken + 2}"]), QUIET, resume=True)
    assert len(losses(run)) == taken + 2


def test_a_signal_to_the_launcher_saves_and_stops_all(recipe_file):
    path, run = recipe_file(max_steps=5000, save_every=5000, val_size=0)
    running = Running(path).at_step(run, 3)
    running.process.send_signal(signal.SIGTERM)
    said = running.ended()
    assert running.process.returncode == 128 + signal.SIGTERM
    (kept,) = run.list_checkpoints()
    assert checkpoint_step(kept) == len(losses(run))
    assert "Traceback" not in said
    assert "error:" not in said
