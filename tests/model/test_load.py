"""Base models are found, refused with a reason, and quantized without damage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import DependencyError, ModelError
from lorakit.hardware import detect_device
from lorakit.model.load import (
    guard_quantized_cpu_weights,
    load_base,
    load_config,
    load_run,
    load_tokenizer,
    locate_model,
    nf4_config,
    public_name,
)
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir

CPU = detect_device("float32", prefer="cpu")


def recipe(model, **values):
    return Recipe(model=str(model), data="d", offline=True, **values)


def test_a_missing_folder_suggests_its_neighbor(tiny_model_dir):
    wrong = tiny_model_dir.parent / (tiny_model_dir.name + "x")
    with pytest.raises(
        ModelError, match=rf"no such folder; did you mean .*{tiny_model_dir.name}\?"
    ):
        locate_model(recipe(wrong))


def test_relative_folders_are_tried_under_each_base(tiny_model_dir):
    found = locate_model(recipe(tiny_model_dir.name), [tiny_model_dir.parent])
    assert found == str(tiny_model_dir.resolve())


def test_hub_ids_stay_and_local_paths_are_not_published(tiny_model_dir):
    assert locate_model(recipe("meta-llama/Llama-2-7b-chat-hf")) == "meta-llama/Llama-2-7b-chat-hf"
    assert public_name("demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name(str(tiny_model_dir)) == tiny_model_dir.name
    assert public_name("user/name") == "user/name"


def test_an_uncached_hub_model_offline_says_what_to_do():
    r = recipe("nobody/nothing-at-all")
    with pytest.raises(ModelError) as caught:
        load_config(r, locate_model(r))
    assert "nobody/nothing-at-all" in str(caught.value)
    assert caught.value.hint


def cached_model(monkeypatch, home, tiny_model_dir, left_out=()):
    """A hub cache with branch main of org/tiny."""
    snapshot = home / "models--org--tiny" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny_model_dir, snapshot, ignore=shutil.ignore_patterns(*left_out))
    refs = home / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789abcdef")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(home))


def test_a_revision_that_is_not_cached_is_named_with_those_that_are(
    monkeypatch, tmp_path, tiny_model_dir
):
    cached_model(monkeypatch, tmp_path, tiny_model_dir)
    load_config(recipe("org/tiny"), "org/tiny")
    with pytest.raises(ModelError, match=r"revision: nope of org/tiny is not .*cached: main\)"):
        load_config(recipe("org/tiny", revision="nope"), "org/tiny")


def test_a_model_that_is_cached_in_part_is_told(monkeypatch, tmp_path, tiny_model_dir):
    cached_model(monkeypatch, tmp_path, tiny_model_dir, left_out=("config.json",))
    with pytest.raises(ModelError, match="org/tiny: the local cache holds only a part"):
        load_config(recipe("org/tiny"), "org/tiny")


def test_a_revision_of_what_has_none_is_refused(tiny_model_dir):
    for model in (str(tiny_model_dir), "demo"):
        with pytest.raises(ModelError, match="revision: v2 has no effect"):
            locate_model(recipe(model, revision="v2"))


def test_a_hub_cache_that_cannot_be_written_is_not_called_a_missing_network(monkeypatch):
    import transformers

    def fail(*_, **__):
        try:
            raise PermissionError(13, "Permission denied", "/root/.cache/huggingface")
        except PermissionError as error:
            raise OSError("There was a problem when trying to write in your cache") from error

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(ModelError, match=r"/root/.cache/huggingface: Permission denied") as caught:
        load_config(recipe("org/name"), "org/name")
    assert "HF_HOME" in caught.value.hint


@pytest.mark.parametrize(
    ("cause", "says", "hint"),
    [
        ("v9 is not a valid git identifier (branch name, tag name or", "revision: main", "cached"),
        ("You are trying to access a gated repo. 403 Forbidden", "gated", "hf auth login"),
        ("404 Client Error: not a valid model identifier", "no such model", "spelling"),
        ("Connection refused", "cannot be reached", "--model demo"),
    ],
)
def test_hub_failures_name_the_cause_and_the_way_out(monkeypatch, cause, says, hint):
    import transformers

    def fail(*_, **__):
        raise OSError(cause)

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(ModelError, match=says) as caught:
        load_config(recipe("org/name"), "org/name")
    assert hint in caught.value.hint


def test_a_folder_without_config_or_of_another_kind_is_refused(tmp_path, tiny_model_dir):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no config\.json in this folder \(found: a\.txt\)"):
        load_config(recipe(tmp_path), str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_config(recipe(tmp_path), str(tmp_path))
    for kind in ("T5", "Florence2", "CLIP"):
        values = {"model_type": kind.lower(), "architectures": [f"{kind}ForConditionalGeneration"]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ModelError, match=rf"not a causal language model .*{kind}"):
            load_config(recipe(tmp_path), str(tmp_path))
    values = json.loads((tiny_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ModelError, match="run its own Python code"):
        load_config(recipe(tmp_path), str(tmp_path))


def test_damaged_weights_are_one_clear_error(tmp_path, tiny_model_dir):
    folder = tmp_path / "torn"
    shutil.copytree(tiny_model_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not an intact"):
        load_base(recipe(folder), str(folder), CPU)


def test_a_folder_without_tokenizer(tmp_path, tiny_model_dir):
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(recipe(tmp_path), str(tmp_path))


def test_qlora_without_working_bitsandbytes_names_the_install_line(monkeypatch):
    import bitsandbytes

    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(DependencyError, match="no kernel image") as caught:
        nf4_config(CPU, set())
    assert "pip install 'bitsandbytes" in caught.value.hint


def test_evaluation_does_not_damage_quantized_weights(tiny_model_dir):
    """bitsandbytes 0.50.2 repacks NF4 weights at the first eval forward on AVX512_BF16 CPUs."""
    import bitsandbytes as bnb

    device = detect_device("bfloat16", prefer="cpu")
    model = load_base(recipe(tiny_model_dir, method="qlora"), str(tiny_model_dir), device)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14

    def weights():
        return [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in layers]

    before = weights()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    for old, new in zip(before, weights(), strict=True):
        assert torch.equal(old, new)
    # Only where the trap exists is the guard's switch there to be off.
    for layer in layers:
        assert getattr(layer, "support_avx512bf16_for_cpu", False) is False


def test_the_guard_switches_off_repacking_on_any_module():
    module = torch.nn.Module()
    module.support_avx512bf16_for_cpu = True
    guard_quantized_cpu_weights(module)
    assert module.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("spelling", ["_orig_mod.", "module."])
def test_an_adapter_of_renamed_tensors_is_refused(finish, spelling):
    """torch.compile and DDP prefix names; peft then loads nothing and only warns."""
    own = finish().run.path
    run = RunDir(own.with_name(f"renamed-{spelling}"))  # beside it: the base's path is relative
    shutil.copytree(own, run.path)
    assert load_run(run)
    path = run.adapter / ADAPTER_WEIGHTS
    tensors = {
        k.replace("model.layers", f"{spelling}model.layers"): v for k, v in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    (run.adapter / "MANIFEST.json").unlink()
    with pytest.raises(ModelError, match=r"0 of \d+ adapter tensors match"):
        load_run(run)
