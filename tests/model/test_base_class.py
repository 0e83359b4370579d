"""The class that config.json names is built, if it has a text decoder; its towers are known."""

import importlib.util

import pytest
import torch
from tests.families import tiny_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    Mistral3ForConditionalGeneration,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    T5Config,
)

from lorakit.errors import DependencyError
from lorakit.model.base_class import (
    auto_class,
    base_class,
    empty_base,
    frozen_config,
    is_inside,
    kept_in_16_bits,
    name_of,
    side_modules,
    text_decoder,
    weights_read_by,
)


@pytest.mark.parametrize(
    ("name", "architecture", "built"),
    [
        ("llama", "LlamaForCausalLM", LlamaForCausalLM),
        ("llama", None, LlamaForCausalLM),
        ("llama", "NoSuchClass", LlamaForCausalLM),
        ("llama", "PreTrainedModel", LlamaForCausalLM),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", Qwen3_5ForConditionalGeneration),
        ("qwen3_5", None, Qwen3_5ForCausalLM),
        ("mistral3", None, Mistral3ForConditionalGeneration),
        ("gemma3", "Gemma3ForConditionalGeneration", Gemma3ForConditionalGeneration),
    ],
)
def test_the_class_that_config_names_is_built(name, architecture, built):
    config = tiny_config(name)
    config.architectures = [architecture] if architecture else None
    assert base_class(config) is built
    assert type(empty_base(config)) is built


def test_a_class_without_text_generation_is_none():
    config = T5Config()
    assert auto_class(config) in (AutoModelForCausalLM, AutoModelForMultimodalLM)
    assert base_class(object()) is None


@pytest.mark.parametrize(
    ("name", "decoder", "sides"),
    [
        ("llama", "model", []),
        ("qwen3_vl", "model.language_model", ["model.visual"]),
        ("llama4", "language_model.model", ["vision_model", "multi_modal_projector"]),
        (
            "gemma4_audio",
            "model.language_model",
            ["model.vision_tower", "model.audio_tower", "model.embed_vision", "model.embed_audio"],
        ),
    ],
)
def test_text_decoder_and_the_parts_beside_it(name, decoder, sides):
    config = tiny_config(name)
    config.architectures = ["Llama4ForConditionalGeneration"]  # of Llama 4; others have one class
    model = empty_base(config)
    assert name_of(model, text_decoder(model)) == decoder
    assert side_modules(model) == sides
    assert name_of(model, torch.nn.Linear(1, 1)) == ""


def test_qlora_leaves_head_towers_and_routers_in_16_bits():
    config = tiny_config("llama4")
    config.architectures = ["Llama4ForConditionalGeneration"]
    kept = kept_in_16_bits(empty_base(config))
    assert {"language_model.lm_head", "vision_model", "multi_modal_projector"} <= kept
    assert "language_model.model.layers.1.feed_forward.router" in kept
    assert is_inside("vision_model.layers.0.mlp.fc1", kept)
    assert not is_inside("vision_model_2.fc1", kept)
    assert not is_inside("language_model.model.layers.1.self_attn.q_proj", kept)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma3n_text", {"prediction_coefs", "correction_coefs", "modality_router"}),
        ("glm5_next", {"weights_proj"}),
        ("falcon_h1", set()),  # the kernel that reads out_proj's weight is not used
        ("qwen3_5_text", set()),  # a convolution's
    ],
)
def test_qlora_leaves_layers_in_16_bits_whose_weight_is_read(name, layers):
    """It would be packed bytes, which Gemma 3n clamps and GLM-5 takes as the type of its input."""
    model = empty_base(tiny_config(name))
    decoder = name_of(model, text_decoder(model))
    kept = {n.rsplit(".")[-1] for n in kept_in_16_bits(model) if n.startswith(f"{decoder}.layers")}
    assert kept == layers


def test_reads_of_weights_are_found_in_decorated_and_inherited_methods():
    class Read(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(1, 1) for _ in range(3))

        @torch.no_grad()
        def forward(self, x):
            return self.c(x) @ self.a.weight.clamp(-1, 1) + self.c.bias

    class Child(Read):
        def other(self):
            return torch.nn.functional.linear(1, weight=self.b.weight)

    assert weights_read_by(Child) == {"a", "b"}


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("gpt_oss", "eager"), ("gemma4_audio", "sdpa")]
)
def test_each_part_takes_the_attention_that_its_class_has(name, attention):
    config = tiny_config(name)
    config._attn_implementation = "eager"
    assert frozen_config(config)._attn_implementation is None
    model = empty_base(config)
    assert text_decoder(model).config._attn_implementation == attention
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "keys"),
    [("seed_oss", ["attention_dropout", "residual_dropout"]), ("gemma3", ["attention_dropout"])],
)
def test_a_frozen_base_has_no_dropout_of_its_own(name, keys):
    config = tiny_config(name, **dict.fromkeys(keys, 0.1))
    text = frozen_config(config).get_text_config()
    assert [getattr(text, key) for key in keys] == [0.0] * len(keys)
    assert getattr(config.get_text_config(), keys[0]) == 0.1
    model = empty_base(config)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_a_tower_of_a_package_that_is_not_installed_is_named():
    if importlib.util.find_spec("timm"):
        pytest.skip("timm is installed")
    text = tiny_config("gemma3n_text").to_dict()
    config = AutoConfig.for_model("gemma3n", text_config=text)
    config.architectures = ["Gemma3nForConditionalGeneration"]
    with pytest.raises(DependencyError, match="gemma3n: TimmWrapperModel requires") as caught:
        empty_base(config)
    assert caught.value.hint == "pip install timm"
