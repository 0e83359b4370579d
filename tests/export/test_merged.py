"""What is merged is what was trained, in every variant, as read back from the disk."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.errors import WorkError
from lorakit.export import merge, merged
from lorakit.export.merged import export_merged
from lorakit.export.source import open_source

from .conftest import VARIANTS, decided, make_run, read_json


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
    original = export_merged(job(run, "original", onto="original"))
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
    run = variant_run("biases")
    streamed, whole = job(run, "streamed"), job(run, "whole")
    export_merged(streamed)
    monkeypatch.setattr(merge, "_reason_against_streaming", lambda _: "a test")
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
    own = merge.write_shards
    monkeypatch.setattr(
        merge,
        "write_shards",
        lambda folder, entries: own(
            folder, [(n, s, (lambda m=m: m() + 1) if "q_proj" in n else m) for n, s, m in entries]
        ),
    )
    with pytest.raises(WorkError, match=r"q_proj.weight is not in the written files"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_said_before_writing(variant_run, job, tmp_path, monkeypatch):
    usage = type("U", (), {"free": 1000})
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WorkError, match="are free"):
        export_merged(job(variant_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(variant_run, job, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged, "check_tokenizer", interrupted)
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
        assert any("bfloat16 rounds much of this" in line for line in order.ends) is hinted
        assert f"{facts['update_kept']:.1%} of the update is left after the cast" in said


def test_a_base_on_which_the_adapter_is_no_gain_gets_a_hint(
    tmp_path, variant_run, job, monkeypatch
):
    monkeypatch.setattr(merged, "make_reference", weak(merged.make_reference))
    order = job(variant_run("qlora"), onto="original")
    export_merged(order)
    assert "farther from what was trained than the untuned model is" in order.ends[0]


def weak(plain):
    """An adapter that changes less than four bits do."""
    return lambda *given: replace(plain(*given), base_kl=1e-9)


def test_what_cannot_be_summed_anew_says_so(variant_run, job, monkeypatch):
    order = job(variant_run("rslora"))
    monkeypatch.setattr(merged.psutil, "virtual_memory", lambda: type("M", (), {"available": 10}))
    monkeypatch.setattr(merge, "_reason_against_streaming", lambda _: "a test")
    facts = export_merged(order)
    assert "GB of memory" in facts["skipped"]
    assert "tensors" not in facts
