"""One run from recipe to files: what is written, what stops it, how it is taken up again."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tests.in_process import exit_code

from lorakit import pipeline
from lorakit.cli.main import main
from lorakit.errors import DataError, LorakitError, RunError, WorkError
from lorakit.model.load import seed_everything
from lorakit.pipeline import fit, prepare_run
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.trainer import LoraTrainer

QUIET = Console(quiet=True, stderr=True)


def test_a_run_leaves_the_files_of_its_contract(finish):
    run = finish().run
    names = {p.name for p in run.path.iterdir()}
    assert names == {
        "recipe.yaml",
        "data_report.json",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "validation.jsonl",
        "checkpoints",
        "adapter",
        "base.json",
        "data_rows.npy",
        "eval.json",
        "report.html",
    }
    recipe = load_recipe(run.recipe).recipe
    assert recipe.target_modules[0] == "q_proj"
    assert recipe.dtype == "float32"
    report = json.loads(run.data_report.read_text())
    assert report["examples_train"] + report["examples_val"] == report["rows_read"] == 30
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(r["tokens"] > 0 and r["tokens_per_second"] > 0 for r in rows)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(finish, tiny_model_dir, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorakit.model.load import load_run, nf4_config

    outcome = finish(method)
    ours = load_run(outcome.run)
    arguments = {"dtype": getattr(torch, ours.device.dtype), "device_map": {"": ours.device.kind}}
    if method == "qlora":
        arguments["quantization_config"] = nf4_config(ours.device, {"lm_head"})
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, **arguments)
    plain = PeftModel.from_pretrained(base, outcome.run.adapter)
    ids = torch.tensor([[5, 99, 1000, 7]], device=ours.device.kind)
    plain.train()  # keeps bitsandbytes from repacking; dropout is then switched off by hand
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_same_recipe_and_seed_give_the_same_bits(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    files = []
    for name in ("a", "b"):
        fit(tiny_recipe(tiny_model_dir, tiny_data, tmp_path / name, max_steps=3), QUIET)
        files.append((RunDir(tmp_path / name).adapter / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_deterministic_is_kept_to_its_run(finish):
    """On a CPU it changes no bit; operations that have no such algorithm would have stopped it."""
    name = "adapter/adapter_model.safetensors"
    files = [(finish(**v).run.path / name).read_bytes() for v in ({}, {"deterministic": True})]
    assert files[0] == files[1]
    assert torch.are_deterministic_algorithms_enabled()
    seed_everything(1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_held_out_rows_a_run_ends_without_evaluation(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r", val_size=0, max_steps=2)
    outcome = fit(resolved, QUIET)
    assert outcome.evaluation is None
    assert not outcome.run.eval.exists()


def test_held_out_loss_is_logged_while_training(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    console = Console(record=True, file=open(os.devnull, "w"), width=120)
    resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r", eval_every=2, max_steps=4)
    outcome = fit(resolved, console)
    text = console.export_text()
    assert "step 2: held-out loss" in text
    line = next(x for x in text.splitlines() if x.startswith("step 4: held-out loss"))
    assert float(line.split()[4].strip(",")) == pytest.approx(
        outcome.evaluation.tuned.loss, abs=2e-3
    )


def test_a_diverged_run_stops_at_once_and_saves_no_adapter(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkError, match=r"step 1: loss nan.*\n.*step 2: loss nan") as error:
        fit(tiny_recipe(folder, tiny_data, tmp_path / "r"), QUIET)
    assert "check that the base model files are complete" in error.value.hint
    assert not (tmp_path / "r" / "adapter").exists()
    assert RunDir(tmp_path / "r").list_checkpoints() == []


def test_overflowing_gradients_stop_before_an_update_and_save_no_adapter(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r", lora_alpha=1e30)
    with pytest.raises(WorkError, match="step 2: gradient norm inf"):
        fit(resolved, QUIET)
    assert not (tmp_path / "r" / "adapter").exists()


def test_everything_masked_is_refused_before_training(tiny_recipe, tiny_model_dir, tmp_path):
    path = tmp_path / "long.jsonl"
    row = {"question": "q " * 200, "answer": "a"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    resolved = tiny_recipe(tiny_model_dir, path, tmp_path / "r", cutoff_len=64)
    with pytest.raises(DataError, match=r"long\.jsonl"):
        fit(resolved, QUIET)


def test_prologue_needs_no_weights(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    start = prepare_run(tiny_recipe(folder, tiny_data, tmp_path / "r"), QUIET)
    assert start.plan.total_bytes > 0
    with pytest.raises(LorakitError):
        fit(tiny_recipe(folder, tiny_data, tmp_path / "r"), QUIET)


def test_sigterm_saves_within_the_step_and_no_step_is_taken_twice(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    values = {"max_steps": 12, "save_every": "60min", "lora_dropout": 0.1}
    fit(tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "whole", **values), QUIET)
    run = RunDir(tmp_path / "cut")
    own, steps = LoraTrainer.training_step, itertools.count(1)

    def signalled(*given, **named):
        if next(steps) == 4:  # in the middle of the step
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*given, **named)

    resolved = tiny_recipe(tiny_model_dir, tiny_data, run.path, **values)
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", signalled)
        outcome = fit(resolved, QUIET)
    assert outcome.exit_code == 143
    assert outcome.steps == 4
    assert [p.name for p in run.list_checkpoints()] == ["step_000004"]
    console = Console(record=True, file=open(os.devnull, "w"), width=120)
    assert fit(resolved, console, resume=True).exit_code == 0
    assert "from step 4 of 12" in console.export_text()
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# The command line, which stands still in its fourth step until a line comes.
STANDS_STILL = """
import itertools, sys
from lorakit.cli.main import main
from lorakit.train.trainer import LoraTrainer
own, steps = LoraTrainer.training_step, itertools.count(1)
def training_step(*given, **named):
    if next(steps) == 4:
        sys.stderr.write("in step 4\\n")
        sys.stderr.flush()
        sys.stdin.readline()
    return own(*given, **named)
LoraTrainer.training_step = training_step
sys.argv[0] = "lorakit"
main()
"""


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_to_the_same_end(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    """A real process, a real signal; the resume is in this process."""
    whole = tmp_path / "whole"
    values = {"max_steps": 8, "save_every": 1000, "lora_dropout": 0.1, "dtype": "float32"}
    fit(tiny_recipe(tiny_model_dir, tiny_data, whole, **values), QUIET)
    command = [sys.executable, "-c", STANDS_STILL, "train", "--offline"]
    command += ["--model", str(tiny_model_dir), "--data", str(tiny_data), "--output", "cut"]
    sets = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-2}
    sets |= {"cutoff_len": 128, "val_size": 4, **values}
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert any("in step 4" in line for line in process.stderr)
    taken = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "cut", **values)
    with pytest.raises(RunError, match=f"another run is writing .* \\(process {process.pid}\\)"):
        fit(taken, QUIET, resume=True)
    process.send_signal(signal.SIGHUP)  # the terminal is closed: no reason to end
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("\n", timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "resume with: lorakit train cut/recipe.yaml --resume" in out
    assert [p.name for p in RunDir(tmp_path / "cut").list_checkpoints()] == ["step_000004"]
    assert not (tmp_path / "cut" / "adapter").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["lorakit", "train", "cut/recipe.yaml", "--resume", "--offline"]
    )
    assert exit_code(main) == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(("stage", "doing"), [("load_base", "loading"), ("LoraTrainer", "placing")])
def test_memory_that_ends_before_step_1_says_where(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, monkeypatch, stage, doing
):
    """The allocator really refuses, where the base is read and where it goes onto the device."""
    monkeypatch.setattr(pipeline, stage, lambda *_: torch.empty(2**50, dtype=torch.uint8))
    with pytest.raises(WorkError, match=rf"out of memory {doing} .* more requested") as error:
        fit(tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r"), QUIET)
    assert "method: qlora" in error.value.hint


def test_a_run_pauses_at_a_step_and_goes_on_to_the_same_bits(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    def recipe(name):
        return tiny_recipe(tiny_model_dir, tiny_data, tmp_path / name, max_steps=4)

    def adapter(outcome):
        return (outcome.run.adapter / "adapter_model.safetensors").read_bytes()

    first = fit(recipe("paused"), QUIET, until=2)
    assert (first.steps, first.exit_code, first.evaluation) == (2, 0, None)
    assert not first.run.has_adapter()
    # Killed before its loss was noted: nothing is trained again.
    again = fit(recipe("paused"), QUIET, resume=True, until=2)
    assert (again.steps, again.paused) == (2, first.paused)
    last = fit(recipe("paused"), QUIET, resume=True, until=9)
    assert (last.steps, last.paused) == (4, None)
    assert adapter(last) == adapter(fit(recipe("alone"), QUIET))
