"""A streamed run from recipe to adapter: the same learning, and it resumes to the bit."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.pipeline import fit
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir

QUIET = Console(quiet=True, stderr=True)


def weights(run):
    return load_file(run.adapter / ADAPTER_WEIGHTS)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_streamed_run_learns_what_the_fast_layers_learn(finish, method):
    values = {"dtype": "float32", "lora_dropout": 0.0, "fused_layers": "on", "learning_rate": 2e-3}
    plain, streamed = (finish(method, weight_offload=way, **values) for way in ("off", "on"))
    losses = [
        [json.loads(line)["loss"] for line in outcome.run.metrics.read_text().splitlines()]
        for outcome in (plain, streamed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    for name, value in weights(plain.run).items():
        torch.testing.assert_close(weights(streamed.run)[name], value, rtol=1e-3, atol=1e-5)
    assert streamed.evaluation.tuned.loss == pytest.approx(plain.evaluation.tuned.loss, rel=1e-5)
    plan = json.loads(streamed.run.plan.read_text())
    assert plan["placement"]["base_on_host"]


def test_it_resumes_to_the_bit(finish, tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    values = {"weight_offload": "on", "fused_layers": "on", "lora_dropout": 0.2, "save_every": 3}
    whole = finish(**values).run
    folder = tmp_path / "r"
    shutil.copytree(whole.path, folder)
    cut = RunDir(folder)
    shutil.rmtree(cut.adapter)
    shutil.rmtree(cut.checkpoint(6))
    resolved = tiny_recipe(tiny_model_dir, tiny_data, folder, **values)
    fit(resolved, QUIET, resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(cut)[name], value), name
