"""What an export starts from: a base that is there and unchanged, and the run's own names."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from lorakit.errors import ModelError
from lorakit.export.tuned_run import checked_prompts, float32_model, open_source, touches_embeddings
from lorakit.model.load import adapter_names, load_run, unmatched
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir


@pytest.fixture
def moved(variant_run, tmp_path):
    """A run and its base, both copied, so that they can be spoiled."""
    source = open_source(variant_run("tied"))
    base, run = tmp_path / "base", RunDir(tmp_path / "run")
    shutil.copytree(source.folder, base)
    shutil.copytree(source.run.path, run.path)
    run.recipe.write_text(run.recipe.read_text().replace(str(source.folder), str(base)))
    return run, base


def test_a_base_that_is_gone_is_named(moved):
    run, base = moved
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="no such folder"):
        open_source(run)


@pytest.mark.parametrize("kept", [0, 100, -8], ids=["empty", "header cut", "end cut"])
def test_a_damaged_adapter_is_named(moved, kept):
    run, _ = moved
    path = run.adapter / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=ADAPTER_WEIGHTS) as caught:
        open_source(run)
    assert "damaged" in caught.value.hint


def test_a_base_that_changed_is_refused_before_anything_is_written(moved):
    run, base = moved
    open_source(run)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not the file this run was trained on") as caught:
        open_source(run)
    assert "restore the base" in caught.value.hint


def test_a_run_without_a_record_of_its_base_still_opens(moved):
    run, _ = moved
    run.base.unlink()
    assert open_source(run).name == "run"


def test_an_adapter_of_another_shape_is_one_clear_error(moved):
    run, _ = moved
    path = run.adapter / "adapter_model.safetensors"
    tensors = {n: t[:, :3].contiguous() for n, t in load_file(path).items()}
    save_file(tensors, path)
    (run.adapter / "MANIFEST.json").unlink()
    with pytest.raises(ModelError, match="does not fit"):
        float32_model(open_source(run))


def test_stops_are_the_templates_and_the_models_own(variant_run):
    source = open_source(variant_run("several stops"))
    assert source.stops() == [2, 0, 7]
    assert source.end_of_turn() == "<|im_end|>"


def test_a_run_without_held_out_rows_is_asked_a_greeting(moved):
    run, _ = moved
    assert len(checked_prompts(open_source(run), 2)) == 2
    run.validation.unlink()
    (only,) = checked_prompts(open_source(run), 2)
    assert only.messages[0].content.startswith("Hello")


def test_embeddings_are_recognized_by_any_familys_name():
    assert touches_embeddings(["base_model.model.model.embed_tokens.lora_embedding_A"])
    assert touches_embeddings(["base_model.model.lm_head.weight"])
    assert not touches_embeddings(["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"])


def test_whole_embeddings_that_were_trained_are_no_foreign_tensors(variant_run):
    """`lorakit eval`, chat and serve refused every run with such `modules_to_save`."""
    for variant in ("modules_to_save", "tied, head trained"):
        run = variant_run(variant)
        model = load_run(run, prefer_cpu=True).model
        assert unmatched(model, set(adapter_names(run))) == (set(), set())
        lost = set(adapter_names(run)) - {"base_model.model.lm_head.weight"}
        assert unmatched(model, {*lost, "more"}) == ({"base_model.model.lm_head.weight"}, {"more"})
