"""Adapters on one base: each answers as it would alone, and switching is quick."""

import shutil

import pytest
import torch

from lorakit.errors import ModelError, RunError
from lorakit.model.load import load_run
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.storage.run_dir import RunDir

IDS = torch.tensor([[1, 4093, 198, 50, 60]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def runs(speaker):
    return speaker("fruit"), speaker("animal")


def test_each_adapter_predicts_as_it_would_alone(runs):
    several = MultiAdapterModel.of(runs[0], (runs[1],))
    for run in (runs[1], runs[0], runs[1]):
        several.switch(run.path.name)
        assert torch.equal(logits(several.model), logits(load_run(run).model))
    assert not any(p.requires_grad for p in several.model.parameters())


def test_switching_moves_no_weight_and_reads_no_file(runs, tmp_path):
    for run in runs:
        shutil.copytree(run.path, tmp_path / run.path.name)
    copies = [RunDir(tmp_path / run.path.name) for run in runs]
    several = MultiAdapterModel.of(copies[0], (copies[1],))
    seen = {}
    for name in list(several.tuned):
        several.switch(name)
        seen[name] = logits(several.model)
    places = {name: p.data_ptr() for name, p in several.model.named_parameters()}
    for copy in copies:
        shutil.rmtree(copy.path)
    for name in list(several.tuned) * 2:
        several.switch(name)
        assert torch.equal(logits(several.model), seen[name])
    assert {name: p.data_ptr() for name, p in several.model.named_parameters()} == places
    assert not torch.equal(*seen.values())


def test_an_adapter_replaced_on_the_disk_goes_on_as_it_was(runs, tmp_path):
    """A run trained anew, deleted or torn while it is served."""
    run = RunDir(tmp_path / "served")
    shutil.copytree(runs[0].path, run.path)
    several = MultiAdapterModel.of(run)
    before = logits(several.model)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # the very file, not a new one of its name
    assert torch.equal(logits(several.model), before)
    shutil.rmtree(run.path)
    assert torch.equal(logits(several.model), before)


def test_what_cannot_share_a_base_is_refused(runs, speaker, tmp_path):
    several = MultiAdapterModel.of(runs[0])
    with pytest.raises(RunError, match="is already loaded"):
        several.add(runs[0])
    with pytest.raises(ModelError, match=r"\(qlora\), not on .*\(lora\)"):
        several.add(speaker("base", method="qlora"))
    other = RunDir(tmp_path / "biased")
    shutil.copytree(runs[1].path, other.path)
    text = other.recipe.read_text()
    other.recipe.write_text(text.replace('bias: "none"', 'bias: "all"'))
    with pytest.raises(ModelError, match="cannot be switched"):
        several.add(other)
    assert list(several.tuned) == [runs[0].path.name]
