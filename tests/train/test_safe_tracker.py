"""A tracker that fails is said once; the run and its metrics go on."""

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from lorakit.storage.run_dir import read_metrics
from lorakit.train.callbacks import SafeTracker

from .faults import examples, said, trained, trainer_of


class TensorBoardCallback(TrainerCallback):
    """In the place of transformers' own, whose package is not installed here."""

    __module__ = "transformers.integrations.integration_utils"
    fails_at = 2
    calls = 0

    def on_log(self, args, state, control, **_):
        type(self).calls += 1
        if state.global_step == self.fails_at:
            raise ConnectionError("502 Bad Gateway\nat https://tracker.example")


@pytest.fixture
def tracked(tiny_model_dir, tmp_path, monkeypatch):
    """`tracked(name)`: a run with this tracker, found by transformers as ever."""
    monkeypatch.setitem(
        integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", TensorBoardCallback
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(TensorBoardCallback, "calls", 0)

    def make(name, trackers):
        values = {"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
        rows = examples([9, 30, 14, 22])
        return trainer_of(tiny_model_dir, tmp_path / name, rows, report_to=trackers, **values)

    return make


def test_training_goes_on_without_it_and_the_metrics_are_whole(tracked):
    plain = tracked("plain", [])
    plain.train()
    trainer = tracked("r", ["tensorboard"])
    trainer.train()
    (line,) = [x for x in said(trainer).splitlines() if "report_to" in x]
    assert line == (
        "report_to: tensorboard failed (502 Bad Gateway); training continues without it, "
        "metrics.jsonl has everything"
    )
    assert TensorBoardCallback.calls == 2
    assert [r["step"] for r in read_metrics(trainer.run)] == [1, 2, 3, 4]
    assert trained(trainer) == trained(plain)


def test_a_tracker_that_works_hears_of_every_step(tracked, monkeypatch):
    monkeypatch.setattr(TensorBoardCallback, "fails_at", 99)
    trainer = tracked("r", ["tensorboard"])
    trainer.train()
    assert TensorBoardCallback.calls >= 4
    assert "report_to" not in said(trainer)


def test_all_but_its_events_is_the_tracker_itself():
    tracker = TensorBoardCallback()
    tracker.project = "p"
    assert SafeTracker(tracker, print).project == "p"
