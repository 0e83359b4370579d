"""Shards come back as they were given, whatever their number, and one is in memory at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.model.safetensors_io import stored_tensors, write_shards

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.ids": torch.arange(4),
    "d.scalar": torch.tensor(2.5),
}


def entries(tensors, log=None):
    def make(name):
        if log is not None:
            log.append(name)
        return tensors[name]

    return [(n, t.nbytes, (lambda n=n: make(n))) for n, t in tensors.items()]


@pytest.mark.parametrize("limit", [10**9, 50, 1])
def test_what_is_written_is_read_back(tmp_path, limit):
    write_shards(tmp_path, entries(TENSORS), limit)
    stored = stored_tensors(tmp_path)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name].read(), tensor)
        assert stored[name].size == tensor.numel()
        assert stored[name].floating == tensor.is_floating_point()


def test_the_index_names_every_tensor_and_its_file(tmp_path):
    write_shards(tmp_path, entries(TENSORS), 50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert len(set(index["weight_map"].values())) == 2


def test_a_tensor_is_made_when_its_shard_is_written(tmp_path):
    log = []
    made = entries(TENSORS, log)
    made[-1] = ("d.scalar", 4, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shards(tmp_path, made, 1)
    assert log == ["a.weight", "b.weight", "c.ids"]
    assert (tmp_path / "model-00003-of-00004.safetensors").exists()


def test_a_second_copy_in_the_folder_is_not_read(tmp_path):
    write_shards(tmp_path, entries(TENSORS))
    save_file({"other": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert stored_tensors(tmp_path).keys() == TENSORS.keys()
