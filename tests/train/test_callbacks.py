"""Rows of metrics, also of a step that is no number, and a stop after the step."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from lorakit.distributed.process_group import SINGLE_PROCESS
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, read_metrics
from lorakit.train import callbacks
from lorakit.train.callbacks import MetricsCallback, PauseAtStep, StopOnSignal
from lorakit.train.diagnostics import RunMonitor
from lorakit.train.gradient_sync import GradientSync
from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False)


def state(step):
    return SimpleNamespace(global_step=step, max_steps=10, epoch=step / 10)


def reporter_of(tmp_path, tokens=640, recipe=None):
    recipe = recipe or Recipe(model="m", data="d")
    trainer = SimpleNamespace(step_tokens=tokens)
    progress = TrainingProgress(Console(quiet=True), RunDir(tmp_path), "cpu")
    return MetricsCallback(trainer, progress, RunMonitor(recipe, None, str))


def test_a_row_has_the_rate_of_its_own_steps(tmp_path, monkeypatch):
    times = iter([100.0, 104.0])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    reporter = reporter_of(tmp_path)
    reporter.on_train_begin(None, state(4), control())
    logs = {"loss": 1.5, "grad_norm": 0.25, "learning_rate": 3e-4}
    reporter.on_log(None, state(6), control(), logs)
    reporter.on_train_end(None, state(6), control())
    (row,) = read_metrics(RunDir(tmp_path))
    assert (row["step"], row["loss"], row["grad_norm"], row["tokens"]) == (6, 1.5, 0.25, 640)
    # Two steps since the start: the seconds are of one, the tokens of both.
    assert (row["seconds"], row["tokens_per_second"]) == (2.0, 160.0)
    assert (row["learning_rate"], row["epoch"]) == (3e-4, 0.6)
    assert reporter.trainer.step_tokens == 0


def test_an_evaluation_is_a_row_of_its_own_and_a_line(tmp_path):
    reporter, text = reporter_of(tmp_path), io.StringIO()
    reporter.progress.console = Console(file=text, width=100)
    reporter.on_train_begin(None, state(4), control())
    reporter.on_log(None, state(6), control(), {"eval_loss": 1.25, "eval_perplexity": 3.5})
    assert read_metrics(RunDir(tmp_path)) == []
    (row,) = read_metrics(RunDir(tmp_path), held_out=True)
    assert row == {"step": 6, "eval_loss": 1.25, "eval_perplexity": 3.5}
    assert text.getvalue() == "step 6: held-out loss 1.2500, perplexity 3.50\n"
    # The next row of a step counts its tokens and its time from the one before.
    assert reporter.trainer.step_tokens == 640


def test_a_skipped_step_is_a_row_of_plain_json(tmp_path):
    reporter = reporter_of(tmp_path)
    reporter.on_train_begin(None, state(0), control())
    logs = {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1}
    reporter.on_log(None, state(1), control(), logs)
    text = RunDir(tmp_path).metrics.read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, 1)


def test_a_stop_saves_after_the_step_it_came_in():
    stop, asked = StopRequest(), control()
    stopper = StopOnSignal(GradientSync(SINGLE_PROCESS, stop))
    assert not stopper.on_step_end(None, state(1), asked).should_training_stop
    stop.signal = 15
    asked = stopper.on_step_end(None, state(1), asked)
    assert asked.should_save
    assert asked.should_training_stop


def test_a_pause_saves_and_stops_at_its_step():
    pause = PauseAtStep(3)
    assert pause.on_step_end(None, state(2), control()) == control()
    for step in (3, 4):
        found = pause.on_step_end(None, state(step), control())
        assert found == SimpleNamespace(should_save=True, should_training_stop=True)
