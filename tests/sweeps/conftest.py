"""Sweeps of tiny runs, and the same runs alone."""

import pytest
from rich.console import Console

from lorakit.pipeline import fit
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, read_metrics
from lorakit.sweeps.run_sweep import start_sweep
from lorakit.sweeps.sweep_plan import SweepRequest

QUIET = Console(quiet=True, stderr=True)
SMALL = {"max_steps": 4, "lora_r": 4, "target_modules": ["q_proj", "up_proj"], "save_every": 2}


def numbers_of(run):
    """All numbers of a run that may not differ: the adapter's bytes and its losses."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    rows = [{key: row[key] for key in keys} for row in read_metrics(run)]
    held = [row["eval_loss"] for row in read_metrics(run, held_out=True)]
    return (run.adapter / ADAPTER_WEIGHTS).read_bytes(), rows, held


@pytest.fixture
def request_of(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    """`request_of(vary, settings, **options)`: a sweep of tiny runs."""

    def build(vary, settings=None, **options):
        values = {"data": tiny_data, **SMALL, **(settings or {})}
        recipe = tiny_recipe(tiny_model_dir, folder=tmp_path / "sweep", **values)
        return SweepRequest(recipe, vary, **options)

    return build


@pytest.fixture
def swept(request_of):
    """`swept(vary, settings, **options)`: the finished sweep."""
    return lambda *args, **options: start_sweep(request_of(*args, **options), QUIET)


@pytest.fixture(scope="session")
def alone(tiny_recipe, tiny_model_dir, tiny_data, tmp_path_factory):
    """`alone(**settings)`: the numbers of the same run, trained by itself, once for all tests."""
    made = {}

    def train(**settings):
        key = repr(sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            values = {**SMALL, **settings}
            made[key] = numbers_of(
                fit(tiny_recipe(tiny_model_dir, tiny_data, folder, **values), QUIET).run
            )
        return made[key]

    return train
