"""A config that says tied gives way to two stored embeddings that differ."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.test_families import make_base, source_of, train
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.export.merge_weights import STREAMED, write_merged
from lorakit.model.param_counts import count
from lorakit.model.tied_head import untie_if_stored_apart


def say_tied(base):
    values = json.loads((base / "config.json").read_text())
    assert not values["tie_word_embeddings"]
    values["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "tied"), [("none", False), ("equal", True), ("one", True), ("no weights", True)]
)
def test_the_stored_weights_decide(tmp_path, change, tied):
    base = make_base("llama", tmp_path)
    say_tied(base)
    path = base / "model.safetensors"
    tensors = load_file(path)
    if change == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif change == "one":
        del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    if change == "no weights":
        path.unlink()
    config = AutoConfig.from_pretrained(base)
    untie_if_stored_apart(config, base)
    assert config.tie_word_embeddings == tied
    assert (count(config).head == 0) == tied


def test_both_are_merged_and_the_config_says_so(tmp_path):
    run, _, _, _ = train("llama", tmp_path, change=say_tied)
    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    assert not source.tied
    assert write_merged(source, folder, "quantized", "float32") == STREAMED
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, base["lm_head.weight"])
