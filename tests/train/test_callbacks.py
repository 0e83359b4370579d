"""Rows of metrics, a stop after the step, and a loss that is no number."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from lorakit.run_dir import RunDir
from lorakit.train.callbacks import Reporter, Stopper
from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False)


def state(step):
    return SimpleNamespace(global_step=step, max_steps=10, epoch=step / 10)


def test_a_row_has_the_rate_of_its_own_steps(tmp_path):
    trainer = SimpleNamespace(step_tokens=640, diverged_at=None)
    run = RunDir(tmp_path)
    reporter = Reporter(trainer, TrainingProgress(Console(quiet=True), run, "cpu"))
    reporter.on_train_begin(None, state(4), control())
    reporter.clock -= 4.0  # as if four seconds had passed
    reporter.on_log(None, state(6), control(), {"loss": 1.5, "grad_norm": 0.25})
    reporter.on_train_end(None, state(6), control())
    (row,) = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert (row["step"], row["loss"], row["grad_norm"], row["tokens"]) == (6, 1.5, 0.25, 640)
    # Two steps since the start: the seconds are of one, the tokens of both.
    assert row["seconds"] == pytest.approx(2.0, rel=0.05)
    assert row["tokens_per_second"] == pytest.approx(160, rel=0.05)
    assert trainer.step_tokens == 0


def test_a_loss_that_is_no_number_stops_without_a_checkpoint(tmp_path):
    trainer = SimpleNamespace(step_tokens=1, diverged_at=None)
    reporter = Reporter(trainer, TrainingProgress(Console(quiet=True), RunDir(tmp_path), "cpu"))
    reporter.on_train_begin(None, state(0), control())
    asked = control()
    asked.should_save = True
    reporter.on_log(None, state(3), asked, {"loss": float("nan")})
    assert trainer.diverged_at == 3
    assert (asked.should_training_stop, asked.should_save) == (True, False)


def test_a_stop_saves_after_the_step_it_came_in():
    stop, asked = StopRequest(), control()
    assert not Stopper(stop).on_step_end(None, state(1), asked).should_training_stop
    stop.signal = 15
    asked = Stopper(stop).on_step_end(None, state(1), asked)
    assert asked.should_save
    assert asked.should_training_stop
