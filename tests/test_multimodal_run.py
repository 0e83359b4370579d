"""A wrapper with a vision tower goes through a run and its exports as it is."""

import json

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tests.model.test_families import make_base

from lorakit.export.exporters import export_run
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapper")
    base = make_base("mistral3", folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w9"}]}
        for i in range(10, 18)
    ]
    image = {"role": "user", "content": [{"type": "image", "image": "cat.jpg"}]}
    rows += [{"messages": [image, rows[0]["messages"][1]]}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = {"model": str(base), "data": str(folder / "rows.jsonl"), "offline": True}
    flags |= {"max_steps": 1, "val_size": 2, "cutoff_len": 16, "dtype": "float32"}
    flags |= {"learning_rate": 0.02, "output_dir": str(folder / "run"), "lora_r": 4}
    console = Console(record=True, width=200, quiet=False, file=(folder / "log").open("w"))
    done = fit(load_recipe(None, [], flags), console)
    return done, base, console.export_text()


def test_towers_stay_frozen_and_the_row_with_an_image_is_left_out(outcome):
    done, _, log = outcome
    assert done.steps == 1
    assert done.unfit is None
    assert "model.vision_tower, model.multi_modal_projector: outside the text decoder" in log
    assert "1 x not text: left out (rows.jsonl:9)" in log
    names = load_file(done.run.adapter / "adapter_model.safetensors")
    assert len(names) == 28
    assert all(".language_model.layers." in name for name in names)


@pytest.mark.parametrize("to", ["merged", "adapter", "vllm"])
def test_each_export_is_verified_in_the_declared_class(outcome, to, tmp_path):
    done, base, _ = outcome
    facts = export_run(done.run, to, tmp_path / to, Console(quiet=True))
    assert facts["base_kl_per_token"] > 0
    if to == "merged":
        written = load_file(tmp_path / to / "model.safetensors")
        assert written.keys() == load_file(base / "model.safetensors").keys()
