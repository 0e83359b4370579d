"""A share of the hundred poisoned runs of benchmarks/poison.py, one of each kind."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "poison.py"


def test_no_poison_reaches_the_weights_or_a_file(tiny_model_dir, tiny_data, tmp_path):
    spec = importlib.util.spec_from_file_location("poison", PATH)
    poison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(poison)
    runs = poison.campaign(tiny_model_dir, tiny_data, tmp_path, range(7))
    found = poison.summary(runs)
    assert set(found["ends"]) == set(poison.KINDS)
    assert found["bad_steps"] >= 6
    assert found["bad_steps_named"] == found["bad_steps"]
    assert found["spikes_named"] == found["spikes"] >= 1
    for name in (
        "bad_updates_applied",
        "bad_adapters_saved",
        "adapters_saved_by_stopped_runs",
        "runs_without_whole_checkpoint",
        "stopped_other_than_at_the_second",
        "ended_by_less_than_two",
    ):
        assert found[name] == 0, name
