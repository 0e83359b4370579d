"""Experts in hub files: each is merged in its place, and another one's is noticed."""

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.model.test_families import logits, source_of, train

from lorakit.errors import WorkError
from lorakit.export.adapter import EXPERTS_IN_PEFT, why_not_portable
from lorakit.export.expert_tensors import expert_places, find_parts
from lorakit.export.merge_weights import STREAMED, skeleton, write_merged
from lorakit.export.serving import why_vllm_cannot
from lorakit.export.tuned_run import float32_model
from lorakit.export.verify_tensors import compare_tensors
from lorakit.model.load import load_run
from lorakit.model.safetensors_io import stored_tensors

MIXTURES = ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "gemma4_moe", "glm4_moe",
            "glm4_moe_lite", "deepseek_v3", "granitemoehybrid", "nemotron_h"]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", MIXTURES)
def test_all_experts_are_trained_saved_merged_and_equal_in_the_declared_class(
    name, method, tmp_path
):
    run, base, model, _ = train(name, tmp_path, method, expert_adapters="all")
    tuned, source = logits(model), source_of(run)
    model_class = getattr(transformers, source.config.architectures[0])
    if method == "lora":
        plain = model_class.from_pretrained(base, dtype="float32")
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(plain, run.adapter)), tuned, rtol=1e-3, atol=1e-3
        )
    again = float32_model(source)  # PEFT's own layers, of dequantized experts
    torch.testing.assert_close(logits(again), tuned, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(load_run(run, prefer_cpu=True).model), tuned)

    folder = tmp_path / "merged"
    folder.mkdir()
    assert write_merged(source, folder, "quantized", "float32") == STREAMED
    assert compare_tensors(source, folder, "quantized")["update_kept"] > 0.999
    merged = model_class.from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-3, atol=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    parts = find_parts(skeleton(source), stored_tensors(base))
    assert {part.place for part in parts.values()} == set(expert_places(skeleton(source)))
    if method == "qlora":
        assert all(not torch.equal(before[n], after[n]) for n in parts)
    assert why_vllm_cannot(source) == why_not_portable(source) == EXPERTS_IN_PEFT


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_exchanged_experts_are_noticed(name, tmp_path):
    run, *_ = train(name, tmp_path, expert_adapters="all")
    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    write_merged(source, folder, "quantized", "float32")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if name == "qwen3_moe":
        pair = [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (2, 5)]
        tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]
    else:
        fused = tensors["model.layers.1.mlp.experts.down_proj"]
        tensors["model.layers.1.mlp.experts.down_proj"] = fused[[1, 0, 2, 3]].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WorkError, match=r"layers.1.mlp.experts.*down_proj.* is not in the written"):
        compare_tensors(source, folder, "quantized")


def test_another_expert_s_update_is_noticed(tmp_path):
    """The base's experts in place, but the update of one added to another."""
    run, *_ = train("qwen3_moe", tmp_path, expert_adapters="all")
    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    write_merged(source, folder, "quantized", "float32")
    before, path = load_file(source.folder / "model.safetensors"), folder / "model.safetensors"
    tensors = load_file(path)
    pair = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (2, 5)]
    updates = [tensors[name] - before[name] for name in pair]
    assert not torch.equal(*updates)
    for name, update in zip(pair, reversed(updates), strict=True):
        tensors[name] = before[name] + update
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WorkError, match=r"experts.[25].up_proj.weight is not in the written"):
        compare_tensors(source, folder, "quantized")


def test_the_original_base_keeps_its_experts_in_a_merge_of_attention(tmp_path):
    run, base, *_ = train("qwen3_moe", tmp_path, "qlora")
    source, folder = source_of(run), tmp_path / "merged"
    folder.mkdir()
    assert write_merged(source, folder, "original", "float32") == STREAMED
    compare_tensors(source, folder, "original")
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before if ".experts." in n)
