"""New tokens without an embedding are refused by name before training."""

import shutil

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lorakit.errors import ModelError
from lorakit.pipeline import fit


def test_added_tokens_without_a_row_are_refused(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<box>", "</box>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError) as error:
        fit(tiny_recipe(folder, tiny_data, tmp_path / "r"), Console(quiet=True))
    words = f"2 tokens without an embedding in the base (first: '<box>', id {size}; the base"
    assert words in error.value.message
    assert not (tmp_path / "r" / "adapter").exists()
