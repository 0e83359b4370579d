"""Every family, tiny and random, as the hub has it: what is written fits the class it declares.

One row per model type: load, targets, two steps, and the same logits from plain peft and from the
merged folder, both in the class that config.json names.
"""

import functools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.families import FAMILIES, MORE, declared_class, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers

from lorakit.export.checkpoint_keys import adapter_keys, folder_keys
from lorakit.export.expert_tensors import find_parts
from lorakit.export.merge_weights import STREAMED, write_merged
from lorakit.export.tuned_run import open_source
from lorakit.export.verify_tensors import compare_tensors
from lorakit.hardware import detect_device
from lorakit.model.base_class import base_class, empty_base, name_of, text_decoder
from lorakit.model.base_fingerprint import remember_base
from lorakit.model.load import load_base, load_config
from lorakit.model.lora_config import add_adapter, lora_config, resolve_targets
from lorakit.model.matching import check_adapter_settings
from lorakit.model.param_counts import count, lora_target_layers
from lorakit.model.safetensors_io import stored_tensors
from lorakit.planning.forecast import forecast
from lorakit.planning.gpus import GPUS, gpu_device
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.checkpoint import save_adapter
from lorakit.train.loss import PACKED, attach_loss, detach_loss
from lorakit.types import Device

WORDS = 320
# transformers 5.23 makes gpt-oss's mask without the positions of packed documents, and GLM-5's
# indexer picks positions of other documents.
MIXES = {"gpt_oss", "glm5_next"}
ADAPTED = {  # number of layers with an adapter
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma"), 14),
    **dict.fromkeys(("granite", "cohere2", "smollm3", "olmo3", "exaone4"), 14),
    **dict.fromkeys(("seed_oss", "hunyuan_v1_dense", "mistral3", "mistral3_small"), 14),
    **dict.fromkeys(("qwen3_vl",), 14),
    **dict.fromkeys(("glm4", "starcoder2"), 12),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3"), 28),
    "muse_glimmer": 32,  # its attention has a gate, too
}


def save_tokenizer(folder):
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w3"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content + ' w2 ' }}{% endfor %}"
    fast.save_pretrained(folder)


def make_base(name, folder):
    """A base folder of this family as on the hub, with tensors that transformers leaves out."""
    config = tiny_config(name)
    torch.manual_seed(0)
    model = declared_class(config)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    if name.startswith("qwen3_5") and hasattr(config, "text_config"):
        path = folder / "model.safetensors"
        more = {"mtp.fc.weight": torch.randn(64, 128), "mtp.norm.weight": torch.randn(64)}
        save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


def train(name, folder, method="lora", change=None, **values):
    """Two steps on random tokens; the run, its base, the tuned model and the recipe."""
    base = make_base(name, folder / "base")
    if change:
        change(base)
    flags = {"model": str(base), "data": "none.jsonl", "offline": True, "dtype": "float32"}
    flags |= {"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.05, **values}
    resolved = load_recipe(None, [], flags)
    config = load_config(resolved.recipe, str(base))
    resolved = resolve_targets(resolved, config)
    recipe = resolved.recipe
    check_adapter_settings(recipe, config)
    model = add_adapter(load_base(recipe, str(base), detect_device("float32", "cpu")), recipe)
    attach_loss(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=30.0)
    for step in range(2):
        torch.manual_seed(step)
        ids = torch.randint(4, WORDS, (2, 12))
        targets, positions = ids[:, 1:].flatten(), torch.arange(24).view(2, 12)[:, :-1].flatten()
        loss = model(input_ids=ids, targets=targets, positions=positions, use_cache=False).loss_sum
        (loss / len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert dead == []
        optimizer.zero_grad()
    detach_loss(model)
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.recipe.write_text(resolved.to_yaml())
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    save_adapter(model, tokenizer, run.adapter, False)
    remember_base(run, recipe, str(base))
    return run, base, model.eval(), recipe


def source_of(run):
    """The run on the CPU, where it was trained: a GPU would quantize a few blocks otherwise."""
    return replace(open_source(run), device=detect_device("float32", "cpu"))


@functools.cache
def question():
    return torch.arange(20).unsqueeze(0) * 31 % WORDS


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=question(), use_cache=False).logits.float()


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_a_family_is_trained_and_exported_as_the_class_it_declares(name, tmp_path):
    run, base, model, recipe = train(name, tmp_path)
    config = load_config(recipe, str(base))
    model_class = getattr(transformers, config.architectures[0])
    assert type(model.get_base_model()) is base_class(config) is model_class

    adapted = {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    decoder = [n for n, m in model.get_base_model().named_modules() if m is text_decoder(model)]
    assert all(n.startswith(f"{decoder[0]}.") for n in adapted)
    assert adapted == {n for n, _, _ in lora_target_layers(recipe, count(config))}
    assert len(adapted) == ADAPTED.get(name, len(adapted)) > 0
    assert not any("router" in n or ".experts" in n or n.endswith(".gate") for n in adapted)

    tuned = logits(model)
    keys = adapter_keys(run, config, model_class)
    assert (keys.missing, keys.unexpected) == ((), ())
    plain = model_class.from_pretrained(base, dtype="float32")
    untuned = logits(plain)
    assert (tuned - untuned).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, run.adapter)), tuned)

    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    assert write_merged(source, folder, "quantized", "float32") == STREAMED
    assert compare_tensors(source, folder, "quantized")["update_kept"] > 0.999
    keys = folder_keys(folder, model_class)
    assert (keys.missing, keys.unexpected) == ((), ())
    merged = model_class.from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-3, atol=1e-3)

    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after.get(n))}
    assert before.keys() == after.keys()
    assert len(changed) == len(adapted)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [model_class.__name__]


def test_the_engine_runs_the_decoder_of_a_wrapper(tmp_path):
    _, _, model, _ = train("mistral3_small", tmp_path)
    own = logits(model)
    attached = attach_loss(model, "on")
    assert attached.engine is not None, attached.layers
    assert attached.packs
    torch.testing.assert_close(logits(model), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_families_are_packed_if_they_isolate_documents(name, dtype):
    config = tiny_config(name)
    torch.manual_seed(0)
    model = declared_class(config)(config).to(dtype)
    assert (attach_loss(model).packing == PACKED) == (name not in MIXES)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_qlora_quantizes_the_decoder_alone_and_merges_what_it_trained_on(name, tmp_path):
    run, base, model, recipe = train(name, tmp_path, "qlora")
    plain = model.get_base_model()
    quantized = {n for n, m in plain.named_modules() if type(m).__name__ == "Linear4bit"}
    decoder = name_of(plain, text_decoder(plain))
    inside = {n.removesuffix(".base_layer") for n in quantized}
    assert inside == {n for n, _, _ in count(load_config(recipe, str(base))).linear}
    assert all(n.startswith(f"{decoder}.") and "router" not in n for n in quantized)

    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    assert write_merged(source, folder, "quantized", "float32") == STREAMED
    assert compare_tensors(source, folder, "quantized")["update_kept"] > 0.999
    merged = base_class(source.config).from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    same = {n for n in before if torch.equal(before[n], after[n])}
    experts = find_parts(empty_base(source.config), stored_tensors(base))
    assert not experts.keys() & same
    # 4-bit values, with an adapter or without
    assert len(before) - len(same) == len(inside) + len(experts)
    dense = {n for n, p in plain.named_parameters() if p.dim() == 3 and "expert" in n}
    assert not dense or name == "llama4"


# GLM-5's indexer picks positions by value, which fake tensors lack: its activations are estimated.
ESTIMATED = {"glm5_next"}
WEIGHTS = ("frozen weights", "embeddings, head and norms", "experts (not quantized)")


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_family_is_planned_for_a_cpu_and_a_gpu_of_the_table(name):
    config = tiny_config(name)
    config.architectures = [declared_class(config).__name__]
    base = empty_base(config)
    parameters = sum(p.numel() for p in base.parameters())
    flags = {"model": "m", "data": "d", "cutoff_len": 64, "lora_r": 4, "micro_batch_size": 1}
    cpu = Device("cpu", "CPU", 16 * 2**30, "bfloat16")
    t4 = gpu_device(GPUS["t4"], None, "auto")
    for device, method in ((cpu, "lora"), (t4, "qlora")):
        resolved = load_recipe(None, [], {**flags, "method": method})
        recipe = resolve_targets(resolved, config).recipe
        found = forecast(recipe, config, device)
        assert found.fits
        assert found.parameters == parameters
        model = get_peft_model(empty_base(config), lora_config(recipe), low_cpu_mem_usage=True)
        assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = found.training.parts
        simulated = "activations (estimate)" not in parts
        assert simulated == (name not in ESTIMATED)
        assert parts["adapters (float32)"] == 4 * found.trainable
        if method == "lora":
            assert sum(parts.get(part, 0) for part in WEIGHTS) == 2 * parameters
        assert (found.speed is None) == bool(found.no_speed)


def pack_experts(base):
    """Replace a gpt-oss base's experts by random MXFP4 ones, as the hub has them."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(groups, 122, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(values))


def test_mxfp4_experts_are_dequantized_and_the_merged_folder_is_plain(tmp_path):
    run, _, model, _ = train("gpt_oss", tmp_path, change=pack_experts)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    assert "quantized on the disk" in write_merged(source, folder, "quantized", "float32")
    written = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in written
    keys = folder_keys(folder, base_class(source.config))
    assert (keys.missing, keys.unexpected) == ((), ())
    merged = base_class(source.config).from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)
