"""What is merged is what was trained, in every variant, as read back from the disk."""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakit.errors import WorkError
from lorakit.export import merge_weights, merged
from lorakit.export.adapter import export_adapter
from lorakit.export.gguf import export_gguf, export_gguf_adapter
from lorakit.export.merged import export_merged
from lorakit.export.tuned_run import open_source

from .conftest import VARIANTS, decided, make_base, make_run, poisoned, read_json


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_adapter_in_float32(variant_run, job, variant, monkeypatch):
    order = job(variant_run(variant))
    made, plain = [], merged.make_reference
    monkeypatch.setattr(merged, "make_reference", lambda *v: made.append(plain(*v)) or made[-1])
    facts = export_merged(order)
    assert facts["written"] == "shard by shard"
    assert facts["kl_per_token"] < 1e-6 < facts["base_kl_per_token"]
    positions, answers = decided(made[0], 1e-4)
    assert facts["top1_agreement"] >= positions > 0.5
    assert facts["greedy_equal"] >= answers
    config = read_json(order.target / "config.json")
    assert "quantization_config" not in config
    untied = variant in ("tied, head adapted", "tied, head trained")
    assert config["tie_word_embeddings"] is (variant == "tied")
    names = set(load_file(order.target / "model.safetensors"))
    assert ("lm_head.weight" in names) is (untied or variant != "tied")


def test_one_cast_rounds_and_is_reported(variant_run, job):
    facts = export_merged(job(variant_run("rslora"), dtype="bfloat16"))
    assert facts["dtype"] == "bfloat16"
    assert facts["sum_kl_per_token"] < 1e-6 < facts["kl_per_token"] < 1e-2


def test_a_qlora_run_goes_onto_either_base(variant_run, job):
    run = variant_run("qlora")
    trained = export_merged(job(run, "trained"))
    original = export_merged(job(run, "original", merge_base="original"))
    assert trained["kl_per_token"] < 1e-6 < original["kl_per_token"]
    assert original["loss_trained_base"] != original["loss_original_base"]
    assert "loss_original_base" not in trained


def test_the_merge_really_holds_the_update(variant_run, job):
    """A merge that silently kept the base would pass a check against itself."""
    run = variant_run("patterns")
    order = job(run)
    export_merged(order)
    found = load_file(order.target / "model.safetensors")
    base = load_file(open_source(run).folder / "model.safetensors")
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    # rank_pattern gives 2, alpha_pattern 32.
    expected = base[f"{name}.weight"] + 16.0 * b @ a
    torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_base_in_memory_gives_the_same_files(variant_run, job, monkeypatch):
    run = variant_run("biases, rope scaling")
    streamed, whole = job(run, "streamed"), job(run, "whole")
    export_merged(streamed)
    monkeypatch.setattr(merge_weights, "_reason_against_streaming", lambda _: "a test")
    assert export_merged(whole)["written"] == "in memory (a test)"
    one, two = (load_file(x.target / "model.safetensors") for x in (streamed, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_merge_that_differs_is_not_kept(variant_run, job, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "LARGEST_KL", -1.0)
    with pytest.raises(WorkError, match="differs from the adapter"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_noticed_and_not_kept(variant_run, job, tmp_path, monkeypatch):
    own = merge_weights.write_shards
    monkeypatch.setattr(
        merge_weights,
        "write_shards",
        lambda folder, entries: own(
            folder, [(n, s, (lambda m=m: m() + 1) if "q_proj" in n else m) for n, s, m in entries]
        ),
    )
    with pytest.raises(WorkError, match=r"q_proj.weight is not in the written files"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_reads_otherwise_is_not_kept(variant_run, job, tmp_path, monkeypatch):
    own = merge_weights.write_tokenizer

    def other(source, folder):
        own(source, folder)
        for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
            path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>bot"))

    monkeypatch.setattr(merge_weights, "write_tokenizer", other)
    with pytest.raises(WorkError, match="otherwise than in training"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_not_written_is_noticed_without_memory_for_models(
    variant_run, job, tmp_path, monkeypatch
):
    own = merge_weights.write_shards
    monkeypatch.setattr(
        merge_weights,
        "write_shards",
        lambda folder, entries: own(folder, [e for e in entries if "0.mlp.up_proj" not in e[0]]),
    )
    with pytest.raises(WorkError, match=r"1 of the class's own are missing .*0.mlp.up_proj"):
        export_merged(job(variant_run("rslora"), verify=False))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wide_run(tokenizer, tmp_path):
    """A run on a base with one weight beyond float16, as bfloat16 models have."""
    base = make_base(tmp_path / "base", tokenizer, "llama", {})
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = -70000.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return make_run(tmp_path / "run", base)


def test_a_value_beyond_float16_is_named_with_a_dtype_that_works(wide_run, job):
    order = job(wide_run, dtype="float16")
    with pytest.raises(WorkError, match=r"1.mlp.down_proj.weight: holds 7e\+04, but") as caught:
        export_merged(order)
    assert "--dtype bfloat16" in caught.value.hint
    assert not order.target.exists()
    assert "kl_per_token" in export_merged(job(wide_run, "wide", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, "export with --quant BF16"),
        ({"quant": "Q4_K_M"}, "add --dtype bfloat16"),
        ({"quant": "Q8_0", "dtype": "float16"}, "add --dtype bfloat16"),
        ({"quant": "F32", "dtype": "float16"}, "add --dtype float32"),
    ],
)
def test_gguf_names_it_before_the_converter_makes_it_infinite(wide_run, job, options, hint):
    order = job(wide_run, verify=False, **options)
    with pytest.raises(WorkError, match=r"1.mlp.down_proj.weight: holds 7e\+04, but") as caught:
        export_gguf(order)
    assert hint in caught.value.hint
    assert not order.target.exists()


@pytest.mark.parametrize("way", [export_adapter, export_merged, export_gguf, export_gguf_adapter])
def test_an_adapter_with_one_nan_is_exported_nowhere(variant_run, job, tmp_path, way):
    run = poisoned(variant_run("rslora"), tmp_path / "run", math.nan)
    order = job(run, verify=False)
    with pytest.raises(WorkError, match=r"down_proj.*: nan at element"):
        way(order)
    assert not order.target.exists()


def test_a_loss_that_is_no_number_is_not_reported(variant_run, monkeypatch):
    plain = merged.score
    monkeypatch.setattr(merged, "score", lambda *a: replace(plain(*a), loss=math.inf))
    source = open_source(variant_run("qlora"))
    with pytest.raises(WorkError, match="held-out loss: inf at the base it was trained on"):
        merged._both_losses(source, source.folder)


def test_too_small_a_disk_is_said_before_writing(variant_run, job, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_weights, "free_bytes", lambda _: 1000)
    with pytest.raises(WorkError, match="are free"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(variant_run, job, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged, "check_exported_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_compares_tensor_by_tensor(variant_run, job, monkeypatch):
    order = job(variant_run("rslora"))
    memory = type("M", (), {"available": 10})
    monkeypatch.setattr(merged.psutil, "virtual_memory", lambda: memory)
    facts = export_merged(order)
    assert "GB of memory" in facts["skipped"]
    assert "kl_per_token" not in facts
    assert facts["tensors"] == len(load_file(order.target / "model.safetensors"))
    assert facts["update_kept"] == pytest.approx(1.0, abs=1e-5)


def test_an_update_that_the_cast_takes_away_gets_a_hint(variant_run, tmp_path, job, monkeypatch):
    monkeypatch.setattr(merged, "memory_missing", lambda _: "too little memory")
    base = open_source(variant_run("rslora")).folder
    for size, hinted in ((1e-5, True), (0.3, False)):
        run = make_run(tmp_path / f"run{size}", base, size=size, dtype="bfloat16")
        order = job(run, f"out{size}")
        order = replace(order, console=Console(record=True, width=200))
        facts = export_merged(order)
        said = order.console.export_text()
        assert (facts["update_kept"] < 0.9) is hinted
        assert any("bfloat16 rounds much of this" in line for line in order.next_steps) is hinted
        assert f"{facts['update_kept']:.1%} of the update is left after the cast" in said


def test_a_base_on_which_the_adapter_is_no_gain_gets_a_hint(
    tmp_path, variant_run, job, monkeypatch
):
    monkeypatch.setattr(merged, "make_reference", weak(merged.make_reference))
    order = job(variant_run("qlora"), merge_base="original")
    export_merged(order)
    assert "farther from what was trained than the untuned model is" in order.next_steps[0]


def weak(plain):
    """An adapter that changes less than four bits do."""
    return lambda *given: replace(plain(*given), base_kl=1e-9)


def test_what_cannot_be_summed_anew_says_so(variant_run, job, monkeypatch):
    order = job(variant_run("rslora"))
    monkeypatch.setattr(merged.psutil, "virtual_memory", lambda: type("M", (), {"available": 10}))
    monkeypatch.setattr(merge_weights, "_reason_against_streaming", lambda _: "a test")
    facts = export_merged(order)
    assert "GB of memory" in facts["skipped"]
    assert "tensors" not in facts
