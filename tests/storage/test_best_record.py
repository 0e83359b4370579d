"""The record of the best step: written, read, and described."""

import pytest

from lorakit.storage.best_record import BestStep, best_step, metric_name
from lorakit.storage.run_dir import RunDir


def test_it_is_read_as_it_was_written(tmp_path):
    run = RunDir(tmp_path)
    assert best_step(run) is None
    found = BestStep(6, 1.25, 16, used=True)
    found.write(run)
    assert best_step(run) == found
    assert found.describe() == ("step 6 of 16, held-out loss 1.2500; the adapter is this step's")


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": "x", "value": 1, "steps": 2, "used": 1}'])
def test_a_damaged_record_is_none(tmp_path, text):
    (tmp_path / "best.json").write_text(text)
    assert best_step(RunDir(tmp_path)) is None


def test_metrics_have_names():
    assert metric_name("eval_loss") == "held-out loss"
    assert metric_name("eval_gsm8k_exact") == "eval_gsm8k_exact"
