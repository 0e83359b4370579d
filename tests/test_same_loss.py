"""One recipe, one curve: however a step is cut, laid out, recomputed or interrupted.

Losses of real runs in float32 without dropout lie within 1e-5 of one another, step by step.
"""

import json
import shutil

import pytest
from rich.console import Console

from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir, read_metrics

QUIET = Console(quiet=True, stderr=True)
PLAIN = {
    "dtype": "float32",
    "lora_dropout": 0.0,
    "val_size": 0,
    "max_steps": 5,  # 30 rows by 8: the fourth step is short, the fifth is of the second epoch
    "learning_rate": 5e-3,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "save_every": 3,
}
WAYS = {
    "2 x 4": {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
    "1 x 8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "padded": {"packing": False},
    "padded 2 x 4": {
        "packing": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "recomputed": {"gradient_checkpointing": True},
    "fast layers": {"fused_layers": "on"},
    "streamed": {"fused_layers": "on", "weight_offload": "on"},
    "resumed": {},
    "streamed and resumed": {"fused_layers": "on", "weight_offload": "on"},
}


@pytest.fixture(scope="module")
def curve(tiny_recipe, tiny_model_dir, tiny_data, tmp_path_factory):
    def losses(**values):
        run = RunDir(tmp_path_factory.mktemp("same") / "run")
        fit(tiny_recipe(tiny_model_dir, tiny_data, run.path, **PLAIN | values), QUIET)
        return run, [row["loss"] for row in read_metrics(run)]

    return losses


@pytest.fixture(scope="module")
def plain(curve):
    return curve()[1]


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_the_same(curve, plain, way):
    run, losses = curve(**WAYS[way])
    placement = json.loads(run.plan.read_text())["placement"]
    assert placement["base_on_host"] == way.startswith("streamed")
    if way.endswith("resumed"):  # from step 3, in the middle of the first epoch
        shutil.rmtree(run.checkpoint(5))
        fit(load_recipe(run.recipe), QUIET, resume=True)
        before, losses = losses, [row["loss"] for row in read_metrics(run)]
        assert losses == before
    assert len(losses) == 5
    assert losses == pytest.approx(plain, abs=1e-5, rel=0)
