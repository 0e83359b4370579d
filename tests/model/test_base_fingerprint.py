"""A base's record changes when a weight does, costs little, and holds no path."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import ModelError
from lorakit.model.base_fingerprint import (
    base_folder,
    check_base,
    remember_base,
    weights_fingerprint,
)
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir


def weights(folder, value):
    tensor = torch.zeros(1000, 1000)
    tensor[500, 500:] = value
    save_file({"w": tensor}, folder / "model.safetensors")
    return weights_fingerprint(folder)


def test_the_same_weights_have_the_same_record(tmp_path):
    assert weights(tmp_path, 1.0) == weights(tmp_path, 1.0)


def test_one_bit_is_enough(tmp_path):
    before = weights(tmp_path, 1.0)
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[2_345_678] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert weights_fingerprint(tmp_path) != before


def test_trained_weights_have_another_even_sampled(tmp_path, monkeypatch):
    """All weights of a layer move in training: 16 samples cannot miss that."""
    monkeypatch.setattr("lorakit.model.base_fingerprint.FULL_HASH_BYTES", 1000)
    before = weights(tmp_path, 1.0)
    save_file({"w": torch.full((1000, 1000), 1e-3)}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != before
    save_file({"v": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != before


def test_a_run_remembers_its_base_without_its_path(tmp_path):
    base, run = tmp_path / "base", RunDir(tmp_path / "run")
    base.mkdir()
    weights(base, 1.0)
    remember_base(run, Recipe(model=str(base), data="d"), str(base))
    text = run.base.read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["weights"]["model.safetensors"]["bytes"] > 4_000_000


def test_another_base_is_refused(tmp_path):
    base, run = tmp_path / "base", RunDir(tmp_path / "run")
    base.mkdir()
    weights(base, 1.0)
    recipe = Recipe(model=str(base), data="d")
    remember_base(run, recipe, str(base))
    check_base(run, recipe, str(base))
    weights(base, 2.0)
    with pytest.raises(ModelError, match=r"model\.safetensors is not the file this run"):
        check_base(run, recipe, str(base))


def test_a_hub_model_that_is_not_cached_has_no_folder():
    recipe = Recipe(model="lorakit-tests/none", data="d")
    assert base_folder(recipe, "lorakit-tests/none") is None
