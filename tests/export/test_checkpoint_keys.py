"""What config.json names has to be able to use what is written: all keys fit, and it predicts."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakit.errors import ModelError, WorkError
from lorakit.export import checkpoint_keys, merge_weights
from lorakit.export.adapter import export_adapter
from lorakit.export.checkpoint_keys import (
    causal_class,
    check_checkpoint_keys,
    check_predictions,
    declared_class,
    folder_keys,
    misfit,
    require_fit,
)
from lorakit.export.merge_weights import write_merged
from lorakit.export.merged import export_merged
from lorakit.export.push_to_hub import export_hub
from lorakit.export.serving import export_vllm
from lorakit.export.tuned_run import float32_model, open_source
from lorakit.export.verify_outputs import make_reference
from lorakit.model.base_class import base_class

from .conftest import SHAPE, VARIANTS, make_base, make_run, read_json


@pytest.fixture(scope="module")
def wrapped(tokenizer, tmp_path_factory):
    """A run on Qwen3.5 as the hub has it: its text model is one part of the class it names."""
    folder = tmp_path_factory.mktemp("wrapped")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text = {**SHAPE, "vocab_size": len(tokenizer), "head_dim": 64, "rope_parameters": rope}
    text |= {"layer_types": ["full_attention"] * 2, "tie_word_embeddings": True}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    )
    for part in (config, config.text_config):
        part.bos_token_id = part.eos_token_id = part.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return make_run(folder / "tuned", folder / "base")


@pytest.fixture
def renamed(tokenizer, tmp_path):
    """`renamed(name)`: a run of the variant "sliding window" whose base names that class."""

    def build(name):
        model_type, config, values = VARIANTS["sliding window"]
        base = make_base(tmp_path / "base", tokenizer, model_type, dict(config))
        path = base / "config.json"
        path.write_text(json.dumps({**read_json(path), "architectures": [name]}))
        return make_run(tmp_path / "run", base, **values)

    return build


def test_the_class_that_is_named_counts_only_where_it_is_another_one(variant_run, wrapped):
    assert declared_class(open_source(variant_run("rslora")).config) is None
    assert causal_class(open_source(variant_run("rslora")).config) is None
    config = open_source(wrapped).config
    assert declared_class(config) is None
    assert base_class(config) is transformers.Qwen3_5ForConditionalGeneration
    assert causal_class(config) is transformers.Qwen3_5ForCausalLM
    config.architectures = ["Qwen3_5Model"]
    assert declared_class(config) is transformers.Qwen3_5Model
    for names in (None, [], ["NoSuchForCausalLM"], ["AutoConfig"]):
        config.architectures = names
        assert declared_class(config) is None


def test_a_wrapper_is_trained_and_exported_as_itself_and_causal_classes_read_it(wrapped, job):
    adapter, merged = export_adapter(job(wrapped, "a")), export_merged(job(wrapped, "m"))
    assert adapter["base_kl_per_token"] > 1e-3
    assert merged["other_class"] == "Qwen3_5ForCausalLM"
    assert merged["other_class_kl_per_token"] < 1e-3
    assert merged["written"] == "shard by shard"
    assert misfit(wrapped, open_source(wrapped).config) is None


def test_a_wrapper_that_is_merged_in_memory_keeps_its_names_too(wrapped, tmp_path, monkeypatch):
    source = open_source(wrapped)
    monkeypatch.setattr(merge_weights, "_reason_against_streaming", lambda _: "a test")
    assert write_merged(source, tmp_path, "quantized", "float32") == "in memory (a test)"
    written = load_file(tmp_path / "model.safetensors")
    base = load_file(source.folder / "model.safetensors")
    assert written.keys() == base.keys()
    assert all(torch.equal(written[n], base[n]) for n in base if "visual" in n or "mtp" in n)
    assert sum(not torch.equal(written[n], base[n]) for n in base) == 14


@pytest.mark.parametrize("way", [export_adapter, export_merged, export_vllm, export_hub])
@pytest.mark.parametrize("verify", [True, False])
def test_what_the_declared_class_cannot_use_is_refused_before_writing(
    renamed, nested, job, tmp_path, way, verify
):
    run = renamed("NestedForCausalLM")
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match="names NestedForCausalLM") as caught:
        way(job(run, repo="someone/something", verify=verify))
    assert "trained as MistralForCausalLM, does not fit it: 0 of 28 tensors" in str(caught.value)
    assert "first: base_model.model.model.layers.0." in caught.value.message
    assert "--to gguf" in caught.value.hint
    assert set(tmp_path.iterdir()) == before


def test_a_merged_folder_misses_what_such_a_class_has(renamed, nested, tmp_path):
    source = open_source(renamed("NestedForCausalLM"))
    (tmp_path / "merged").mkdir()
    write_merged(source, tmp_path / "merged", "quantized", "float32")
    keys = folder_keys(tmp_path / "merged", base_class(source.config))
    assert (keys.missing, keys.unexpected) == ((), ())
    with pytest.raises(WorkError, match=r"does not fit NestedForCausalLM: 0 of 21") as caught:
        check_checkpoint_keys(source, tmp_path / "merged", nested)
    assert "21 of the class's own are missing" in caught.value.message
    assert "nothing was kept" in caught.value.message


@pytest.mark.parametrize("change", ["lost", "more", "renamed"])
def test_one_tensor_too_few_or_too_many_is_enough(variant_run, tmp_path, change):
    source = open_source(variant_run("rslora"))
    shutil.copytree(source.folder, tmp_path / "m")
    check_checkpoint_keys(source, tmp_path / "m", base_class(source.config), None)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    value = tensors[name] if change == "more" else tensors.pop(name)
    if change != "lost":
        tensors["model.layers.1.mlp.other.weight"] = value.clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    named = name if change == "lost" else "model.layers.1.mlp.other.weight"
    with pytest.raises(WorkError, match=f"does not fit LlamaForCausalLM: .*first: {named}"):
        check_checkpoint_keys(source, tmp_path / "m", base_class(source.config))


@pytest.fixture
def other(monkeypatch):
    """`other(change)`: one more class of transformers, a Mistral with changed logits."""

    def build(change):
        class OtherForCausalLM(transformers.MistralForCausalLM):
            def forward(self, *given, **named):
                out = super().forward(*given, **named)
                out.logits = change(out.logits)
                return out

        monkeypatch.setattr("transformers.OtherForCausalLM", OtherForCausalLM, raising=False)

    return build


@pytest.fixture
def nested(monkeypatch):
    """One more class of transformers, with Mistral one module deeper."""

    class NestedForCausalLM(transformers.MistralPreTrainedModel, transformers.GenerationMixin):
        def __init__(self, config):
            super().__init__(config)
            self.inner = transformers.MistralForCausalLM(config)
            self.post_init()

        def get_input_embeddings(self):
            return self.inner.model.embed_tokens

    monkeypatch.setattr("transformers.NestedForCausalLM", NestedForCausalLM, raising=False)
    return NestedForCausalLM


def test_another_class_that_computes_the_same_is_used(renamed, other, job):
    other(lambda logits: logits)
    run = renamed("OtherForCausalLM")
    adapter, merged = export_adapter(job(run, "a")), export_merged(job(run, "m"))
    assert adapter["other_class"] == merged["other_class"] == "OtherForCausalLM"
    assert adapter["other_class_kl_per_token"] < 1e-9
    assert merged["other_class_kl_per_token"] < 1e-6


def test_another_class_that_computes_something_else_is_refused(renamed, other, tmp_path):
    """Its names fit, so that the adapter is loaded."""
    other(lambda logits: logits.flip(-1))
    source = open_source(renamed("OtherForCausalLM"))
    reference = make_reference(source, float32_model(source), 1, 2)
    (tmp_path / "merged").mkdir()
    write_merged(source, tmp_path / "merged", "quantized", "float32")
    require_fit(source)
    for folder, expected in ((source.run.adapter, None), (tmp_path / "merged", 0.0)):
        with pytest.raises(WorkError, match=r"OtherForCausalLM predicts something else"):
            other_class = declared_class(source.config)
            check_predictions(source, reference, folder, other_class, expected)


def test_a_class_that_cannot_be_built_is_refused(renamed, job):
    order = job(renamed("Qwen3VLForConditionalGeneration"))
    with pytest.raises(ModelError, match="which engines build, and that cannot be built from it"):
        require_fit(order.source)


def test_a_run_with_nothing_to_say_builds_no_model(variant_run, monkeypatch):
    monkeypatch.setattr(checkpoint_keys, "_empty", None)
    run = variant_run("rslora")
    assert misfit(run, open_source(run).config) is None
