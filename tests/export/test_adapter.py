"""The adapter travels whole, and a folded one says the same with alpha = rank and nothing else."""

import pytest
from peft import PeftModel

from lorakit.export.adapter import export_adapter, fold_adapter, why_not_portable
from lorakit.export.tuned_run import float32_model, open_source
from lorakit.export.verify_outputs import agreement, make_reference

from .conftest import read_json


def test_the_exported_adapter_is_the_runs_with_tokenizer_and_template(variant_run, job):
    order = job(variant_run("dora"))
    facts = export_adapter(order)
    assert facts["kl_per_token"] == 0.0
    names = {p.name for p in order.target.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert read_json(order.target / "adapter_config.json")["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("variant", ["rslora", "patterns"])
def test_a_folded_adapter_predicts_the_same_with_nothing_left_to_misread(
    variant_run, tmp_path, variant
):
    source = open_source(variant_run(variant))
    rank = fold_adapter(source, tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] == rank
    left = config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]
    assert left == (False, {}, {})
    live = float32_model(source)
    reference = make_reference(source, live, 2, 4)
    folded = PeftModel.from_pretrained(live.unload(), str(tmp_path)).eval()
    found = agreement(reference, folded, "the folded adapter")
    assert found.kl_per_token < 1e-7
    assert reference.base_kl > 1e-3


WHY = {
    "rslora": None,
    "dora": "DoRA",
    "biases, rope scaling": "biases",
    "modules_to_save": "embed_tokens, lm_head were trained in full",
    "tied, head adapted": "the embedding or the head",
}


@pytest.mark.parametrize("variant", WHY)
def test_what_plain_lora_cannot_carry_is_named(variant_run, variant):
    reason = why_not_portable(open_source(variant_run(variant)))
    assert reason is None if WHY[variant] is None else WHY[variant] in reason
