"""Two processes share each step: the numbers of one, and no hang where one of them ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.rank_ports import free_port

from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir, read_metrics
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
SHARDED = {"method": "qlora", "fused_layers": "on", "sharding": "on"}
# One example a micro-batch: the ranks have unequal numbers of them.
UNEQUAL = {
    "gradient_checkpointing": True,
    "packing": False,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 8,
}
# What `accelerate launch --use_fsdp --fsdp_version 2` sets.
ACCELERATE_FSDP = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
STREAMED = {"method": "qlora", "fused_layers": "on", "weight_offload": "on"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty rows of so different lengths that packing pays."""
    path = tmp_path_factory.mktemp("ranks-data") / "rows.jsonl"
    rows = [
        {
            "question": f"What color is box {i}?",
            "answer": "It is " + "very " * (14 * i % 46) + "red.",
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe_file(tiny_recipe, tiny_model_dir, data, tmp_path_factory):
    def write(rows=data, **values):
        folder = tmp_path_factory.mktemp("ranks")
        run = folder / "run"
        resolved = tiny_recipe(tiny_model_dir, rows, run, **PLAIN | values)
        path = folder / "recipe.yaml"
        path.write_text(resolved.to_yaml())
        return path, RunDir(run)

    return write


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the ranks have it: more threads add up in another order. For the fixtures below too."""
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
        command(*words, gpus=gpus), env=environment(), capture_output=True, text=True, timeout=500
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
    # Not element by element: AdamW makes a step of full size from a gradient that is near zero,
    # where another order of sums (another instruction set) changes its sign.
    for name, tensor in mine.items():
        difference = float((tensor - theirs[name]).norm() / theirs[name].norm())
        assert difference < 1e-4, name
    files = [sorted(p.name for p in run.adapter.iterdir()) for run in (one, other)]
    assert files[0] == files[1]


def from_step_3(run, folder):
    """A copy of a finished run as it was after its first checkpoint."""
    copy = RunDir(folder / "run")
    shutil.copytree(run.path, copy.path)
    shutil.rmtree(copy.checkpoint(6))
    shutil.rmtree(copy.adapter)
    return copy


@pytest.fixture(scope="module")
def forked(recipe_file, alone, data, tmp_path_factory):
    """Runs of ranks that need no launcher of ours, in one go: {name: (run, rows, said, codes)}."""
    jobs, runs = [], {}

    def add(name, words, run, ranks=2, fails=None, env=None):
        folder = tmp_path_factory.mktemp(name)
        runs[name] = run, folder
        words = ["train", *map(str, words), "--offline"]
        job = {"name": name, "words": words, "ranks": ranks, "folder": str(folder)}
        jobs.append({**job, "fails": fails, "env": env or {}})

    resumed = from_step_3(alone, tmp_path_factory.mktemp("one-then-two"))
    add("one then two", [resumed.recipe, "--resume"], resumed)
    path, run = recipe_file(**SHARDED)
    add("spread", [path], run)
    path, run = recipe_file(fsdp={}, **UNEQUAL)
    add("fsdp", [path], run)
    resumed = from_step_3(alone, tmp_path_factory.mktemp("one-then-fsdp"))
    add("one then fsdp", [resumed.recipe, "--resume"], resumed, env=ACCELERATE_FSDP)
    path, run = recipe_file(fsdp={"cpu_offload": True})
    add("two sources", [path], run, env=ACCELERATE_FSDP)
    path, run = recipe_file()
    add("deepspeed", [path], run, env={"ACCELERATE_USE_DEEPSPEED": "true"})
    epochs = {"max_steps": None, "epochs": 2.0, "val_size": 0}
    for ranks in (1, 2):
        path, run = recipe_file(**epochs)
        add(f"epochs {ranks}", [path], run, ranks=ranks)
    single = data.parent / "single.jsonl"
    single.write_text(data.read_text().splitlines()[0] + "\n")
    path, run = recipe_file(single, **epochs)
    add("one row", [path], run)
    path, run = recipe_file()
    add("no memory", [path], run, fails=1)
    contrary = data.parent / "contrary.jsonl"  # its loss falls, then rises
    answers = [f"What color is box {i}?" for i in range(4)]
    contrary.write_text(
        "".join(json.dumps({"question": q, "answer": "It is purple."}) + "\n" for q in answers)
    )
    stopping = {
        "from_adapter": str(alone.path), "val_size": None, "val_data": str(contrary),
        "eval_every": 1, "early_stopping_patience": 2, "learning_rate": 3e-2, "max_steps": 12,
        "lr_scheduler": "constant",
    }  # fmt: skip
    for ranks in (1, 2):
        path, run = recipe_file(**stopping)
        add(f"best step {ranks}", [path], run, ranks=ranks)
    script = Path(__file__).with_name("forked_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps({"jobs": jobs})],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    return {name: Ended(*runs[name], **ends[name]) for name in runs}


@dataclass
class Ended:
    run: RunDir
    folder: Path
    codes: list

    def said(self, rank):
        return (self.folder / f"said_{rank}.txt").read_text()

    def rows(self, rank):
        """Rows of the data that this rank computed, step by step."""
        path = self.folder / f"rows_{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def rows_of_all(self):
        ranks = zip(*(self.rows(n) for n in range(len(self.codes))), strict=True)
        return [sorted(row for rows in step for row in rows) for step in ranks]


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


def test_a_run_of_one_goes_on_with_two(alone, forked):
    ended = forked["one then two"]
    assert ended.codes == [0, 0], ended.said(0)
    assert "1 rank before, 2 now" in ended.said(0)
    same(ended.run, alone)


def test_a_base_spread_over_ranks_computes_as_one_that_is_streamed(recipe_file, forked):
    streamed, whole = recipe_file(**STREAMED)
    fit(load_recipe(streamed), QUIET)
    ended = forked["spread"]
    assert ended.codes == [0, 0], ended.said(0)
    assert "sharded over 2" in ended.said(0)
    assert json.loads(ended.run.plan.read_text())["placement"]["shards"] == 2
    same(ended.run, whole)


def test_a_base_sharded_by_fsdp_has_the_numbers_of_one_process(forked, alone):
    ended = forked["fsdp"]
    assert ended.codes == [0, 0], ended.said(0)
    assert "all recomputed in 2 layers" in ended.said(0)
    parts = json.loads(ended.run.plan.read_text())["parts"]
    assert parts["two layers, gathered"] == 2 * parts["frozen weights"], "half of two layers each"
    same(ended.run, alone)


def test_a_run_of_one_goes_on_with_fsdp_of_accelerate_launch(forked, alone):
    ended = forked["one then fsdp"]
    assert ended.codes == [0, 0], ended.said(0)
    recipe = ended.run.recipe.read_text()
    assert 'fsdp: {"reshard_after_forward": false, "cpu_offload": false}' in recipe
    assert "derived: accelerate launch" in recipe
    same(ended.run, alone)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two sources", "fsdp has two sources: the recipe has {'cpu_offload': True}, accelerate"),
        ("deepspeed", "ACCELERATE_USE_DEEPSPEED=true of accelerate launch is not supported: Deep"),
    ],
)
def test_options_of_accelerate_launch_that_cannot_be_are_one_message(forked, name, words):
    ended = forked[name]
    assert ended.codes == [2, 1], "rank 0 names it, the other ends without words"
    assert words in " ".join(ended.said(0).split())
    assert (ended.said(0) + ended.said(1)).count("error:") == 1
    assert not ended.run.path.exists()


def test_each_row_is_computed_once_an_epoch_in_the_order_of_one_process(forked):
    one, two = forked["epochs 1"], forked["epochs 2"]
    assert one.codes + two.codes == [0, 0, 0], two.said(0)
    steps = two.rows_of_all()
    assert steps == one.rows_of_all()
    assert len(steps) == 8
    for epoch in (steps[:4], steps[4:]):
        assert sorted(row for step in epoch for row in step) == list(range(1, 31))
    assert all(two.rows(0)), "both have a part of every step"
    assert all(two.rows(1))


def test_two_ranks_start_from_an_adapter_and_stop_at_the_best_step_as_one_does(forked, alone):
    one, two = forked["best step 1"], forked["best step 2"]
    assert one.codes + two.codes == [0, 0, 0], two.said(0)
    best, other = (json.loads(ended.run.best.read_text()) for ended in (two, one))
    assert best["step"] == other["step"] == len(losses(two.run)) - 2 < 10, "patience ended both"
    # At this rate Adam makes more of the last bit of a gradient than `same` allows.
    assert losses(two.run) == pytest.approx(losses(one.run), abs=1e-4)
    assert best["value"] == pytest.approx(other["value"], abs=1e-4)
    started, first = (
        load_file(folder / ADAPTER_WEIGHTS) for folder in (alone.adapter, two.run.adapter)
    )
    kept = load_file(two.run.checkpoint(best["step"]) / ADAPTER_WEIGHTS)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.items())
    assert started.keys() == first.keys()
    assert two.run.start.exists()


def test_one_row_for_two_ranks_hangs_nobody(forked):
    ended = forked["one row"]
    assert ended.codes == [0, 0], ended.said(0)
    assert ended.rows(0) == [[1], [1]]
    assert ended.rows(1) == [[], []]
    assert len(losses(ended.run)) == 2
    assert ended.run.has_adapter()


def test_a_rank_without_memory_for_the_base_speaks_for_itself_and_ends_the_other(forked):
    ended = forked["no memory"]
    assert ended.codes == [1, 1]
    assert ended.said(1).count("error:") == 1
    assert "out of memory" in ended.said(1) or "not enough memory" in ended.said(1)
    assert "error:" not in ended.said(0)
    assert "Traceback" not in ended.said(0) + ended.said(1)
    assert not ended.run.has_adapter()


class Running:
    """A run of two ranks in the background."""

    def __init__(self, *words, launch=None):
        words = [*launch, "-m", "lorakit", "train", *words] if launch else command(*words, gpus=2)
        self.process = subprocess.Popen(
            words,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
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
        # A collective waits for 30 days (`HOST_TIMEOUT`) for a rank that nobody names.
        _, said = self.process.communicate(timeout=300)
        return said


def torchrun(node, port):
    """The command of torchrun on one of two machines, with one rank each."""
    place = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
    address = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, "-m", "torch.distributed.run", *place, *address]


@pytest.fixture(scope="module")
def in_trouble(recipe_file):
    """Four runs of two ranks; a rank, a rank and the launcher get a signal.

    The fourth is one of `accelerate launch`. The ranks of the run whose rank is killed are on two
    "machines": each has a torchrun of its own.
    """
    path, run = recipe_file()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    accelerated = Running(path, "--offline", launch=[*launch, "--num_processes", "2"])
    ends = {"accelerate": (path, run, accelerated, None)}
    started, victims = {}, {}
    # One after the other: none trains on while another one imports its libraries.
    for fault in (signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM):
        path, run = recipe_file(max_steps=5000, save_every=2, val_size=0, lora_dropout=0.1)
        if fault == signal.SIGKILL:
            port = str(free_port())
            first, second = (Running(path, launch=torchrun(node, port)) for node in "01")
            started[fault] = path, run, first
        else:
            started[fault] = path, run, Running(path)
        running = started[fault][2].at_step(run, 5)
        if fault == signal.SIGTERM:
            victims[fault] = running.process.pid
        else:
            victims[fault] = (second if fault == signal.SIGKILL else running).rank(1)
        os.kill(victims[fault], fault)
    assert "error: " not in second.ended()
    ends["accelerate"] += (accelerated.ended(),)
    for fault in reversed(started):
        path, run, running = started[fault]
        ends[fault] = path, run, running, victims[fault], running.ended()
    return ends


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_and_the_run_resumes(in_trouble, fault):
    path, run, running, victim, said = in_trouble[fault]
    assert running.process.returncode == 1
    assert "rank 1 (cpu:1 on" in said, said
    assert f"process {victim}" in said
    assert said.count("error:") == 1, said
    if fault == signal.SIGSTOP:  # torchrun adds the stack of its own exception
        assert "Traceback" not in said
    assert not psutil.pid_exists(victim)
    assert (run.path / "stacks_rank0.txt").exists()
    assert f"{run.path}/stacks_rank*.txt" in said
    assert f"lorakit train {run.recipe} --resume --gpus 2" in said
    taken = len(losses(run))
    fit(load_recipe(path, [f"max_steps={taken + 2}"]), QUIET, resume=True)
    assert len(losses(run)) == taken + 2


def test_accelerate_launch_trains_as_it_is(in_trouble, alone):
    _, run, running, _, said = in_trouble["accelerate"]
    assert running.process.returncode == 0, said
    assert "ranks    2 share each step" in said
    same(run, alone)


def test_a_signal_to_the_launcher_saves_and_stops_all(in_trouble):
    _, run, running, _, said = in_trouble[signal.SIGTERM]
    assert running.process.returncode == 128 + signal.SIGTERM
    assert checkpoint_step(run.list_checkpoints()[-1]) == len(losses(run))
    assert "Traceback" not in said
    assert "error:" not in said
