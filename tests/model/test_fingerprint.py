"""A base's record changes when a weight does, costs little, and holds no path."""

import json

import torch
from safetensors.torch import save_file

from lorakit.model.fingerprint import base_folder, fingerprint, remember_base
from lorakit.recipe import Recipe
from lorakit.run_dir import RunDir


def weights(folder, value):
    tensor = torch.zeros(1000, 1000)
    tensor[500, 500:] = value
    save_file({"w": tensor}, folder / "model.safetensors")
    return fingerprint(folder)


def test_the_same_weights_have_the_same_record(tmp_path):
    assert weights(tmp_path, 1.0) == weights(tmp_path, 1.0)


def test_trained_weights_have_another(tmp_path):
    """All weights of a layer move in training: 16 samples cannot miss that."""
    before = weights(tmp_path, 1.0)
    save_file({"w": torch.full((1000, 1000), 1e-3)}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before
    save_file({"v": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_a_run_remembers_its_base_without_its_path(tmp_path):
    base, run = tmp_path / "base", RunDir(tmp_path / "run")
    base.mkdir()
    weights(base, 1.0)
    remember_base(run, Recipe(model=str(base), data="d"), str(base))
    text = run.base.read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["weights"]["model.safetensors"]["bytes"] > 4_000_000


def test_a_hub_model_that_is_not_cached_has_no_folder():
    recipe = Recipe(model="lorakit-tests/none", data="d")
    assert base_folder(recipe, "lorakit-tests/none") is None
