"""One forecast: from config.json alone, as JSON, and the refusal of what cannot fit."""

import json
import shutil

import pytest

from lorakit.errors import ModelError, WorkError
from lorakit.model.stored_quantization import UntrainableWeights
from lorakit.planning import forecast as module
from lorakit.planning.forecast import (
    find_config,
    forecast,
    planned_speed,
    require_plan_fits,
    saving,
)
from lorakit.planning.gpus import GPUS, gpu_device, with_gpu_count
from lorakit.planning.known_models import shape_config
from lorakit.planning.planner import plan_training
from lorakit.planning.stages import disk_parts, host_parts, merge_parts, phases
from lorakit.planning.suggestions import Suggestion, smallest_gpu
from lorakit.recipe.schema import Recipe

H100 = gpu_device(GPUS["h100"], None, "auto")
T4 = gpu_device(GPUS["t4"], None, "auto")


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})


def test_a_forecast_is_json_and_its_sums_agree():
    found = forecast(recipe(), shape_config("llama-2-7b"), H100)
    value = json.loads(json.dumps(found.as_dict()))
    assert value["fits"]
    assert value["parameters"] == 6_738_415_616
    assert value["trainable"] == 39_976_960
    assert value["tokens_per_second"] > 10_000
    assert value["training"]["total_bytes"] == sum(value["device_bytes"]["training"].values())
    assert value["changes"] == []


def test_each_part_of_a_forecast_is_under_its_own_name():
    asked, config = recipe(weight_offload="off"), shape_config("llama-2-7b")
    plan = plan_training(asked, config, T4)
    value = forecast(asked, config, T4, local=True).as_dict()
    assert value["training"] == plan.as_dict()
    assert value["device_bytes"] == phases(asked, config, T4, plan)
    assert value["host_bytes"] == host_parts(asked, T4, plan)
    assert value["merge_bytes"] == merge_parts(config)
    assert value["disk_bytes"] == disk_parts(asked, config, local=True)
    assert value["speed_basis"] == "an estimate from its data sheet"
    assert (value["fits"], value["fewest_gpus"]) == (False, 2)
    assert value["smallest_gpu"] == smallest_gpu(asked, config, T4).name
    assert value["context"] == 4096
    assert value["changes"]
    assert value["scale"] is None


@pytest.mark.parametrize("values", [{}, {"weight_offload": "off", "sharding": "off"}])
def test_more_gpus_are_told_only_where_they_are_needed_and_help(values):
    device = H100 if not values else T4
    found = forecast(recipe(**values), shape_config("llama-2-7b"), device)
    assert found.fits is (not values)
    assert found.fewest_gpus is None


@pytest.mark.parametrize(
    ("slower", "words"),
    [
        (0.3, "2.0 GiB, saves 1.5, 30% slower, its price"),
        (0.005, "2.0 GiB, saves 1.5, no slower, its price"),
        (-0.4, "2.0 GiB, saves 1.5, no slower, its price"),
        (None, "2.0 GiB, saves 1.5, its price"),
    ],
)
def test_what_a_change_saves_and_costs(slower, words):
    assert saving(Suggestion({}, "its price", 2 * 2**30, 3 * 2**29, True, slower)) == words


def test_streaming_that_fits_is_told_with_what_would_be_faster():
    # 512 tokens do not hide a copy of 26 GB.
    asked, card = recipe(gradient_accumulation_steps=1, cutoff_len=512), GPUS["4090"]
    found = forecast(asked, shape_config("llama-2-13b"), gpu_device(card, None, "auto"), card)
    assert found.fits
    assert found.training.placement.base_on_host
    assert all(change.fits and change.slower < -0.05 for change in found.changes)
    assert "qlora" in found.changes[0].flags


def test_config_json_alone_is_enough(tiny_model_dir, tmp_path):
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "config.json")
    config, source, local = find_config(recipe(model=str(tmp_path), offline=True), [tmp_path])
    assert (config.hidden_size, source, local) == (64, "config.json", True)
    assert forecast(recipe(), config, H100).fits


def test_names_need_no_network_and_repositories_fall_back_on_published_values():
    named, source, _ = find_config(recipe(model="llama-2-7b"), [])
    assert source == "published values"
    gated = recipe(model="meta-llama/Llama-2-7b-chat-hf", offline=True, revision="nowhere")
    config, source, local = find_config(gated, [])
    assert config.to_dict() == named.to_dict()
    assert "out of reach" in source
    assert not local


def test_a_misspelt_name_is_told_with_the_known_ones():
    with pytest.raises(ModelError, match="did you mean llama-2-7b") as caught:
        find_config(recipe(model="llama2-7b", offline=True), [])
    assert "qwen3-30b-a3b" in caught.value.hint


def test_what_cannot_fit_is_refused_with_what_would():
    config, asked = shape_config("llama-2-7b"), recipe(weight_offload="off")
    plan = plan_training(asked, config, T4)
    with pytest.raises(WorkError, match="does not fit") as caught:
        require_plan_fits(asked, config, T4, plan)
    assert "T4 has 14.6 GiB" in caught.value.message
    assert "--set weight_offload=auto" in caught.value.message
    assert "--set method=qlora" in caught.value.message
    assert "--gpus 2  (the same result, the base sharded over them)" in caught.value.message
    assert "--force" in caught.value.hint
    require_plan_fits(asked, config, H100, plan_training(asked, config, H100))
    tight = recipe(memory_limit="1GiB", weight_offload="off")
    with pytest.raises(WorkError, match="memory_limit is 1GiB"):
        require_plan_fits(tight, config, H100, plan_training(tight, config, H100))


def test_streaming_is_refused_where_the_host_is_too_small(monkeypatch):
    config, asked = shape_config("llama-2-7b"), recipe(weight_offload="on")
    plan = plan_training(asked, config, T4)
    assert plan.fits
    monkeypatch.setattr(module, "host_memory", lambda: 8 * 2**30)
    with pytest.raises(WorkError, match=r"the base.* in host memory: .* has 8.0 GiB"):
        require_plan_fits(asked, config, T4, plan)
    monkeypatch.setattr(module, "host_memory", lambda: 64 * 2**30)
    require_plan_fits(asked, config, T4, plan)
    eight = with_gpu_count(T4, 8, None, None)
    with pytest.raises(WorkError, match=r"for 8 processes; this machine has 64.0 GiB"):
        require_plan_fits(asked, config, eight, plan_training(asked, config, eight))
    spread = recipe(sharding="on")
    monkeypatch.setattr(module, "host_memory", lambda: 16 * 2**30)
    with pytest.raises(WorkError, match="of it while the base is loaded") as caught:
        require_plan_fits(spread, config, eight, plan_training(spread, config, eight))
    assert "method: qlora" in caught.value.hint


def test_speed_is_rounded_to_what_is_known():
    asked, config = recipe(), shape_config("llama-2-7b")
    speed, why = planned_speed(asked, config, H100, plan_training(asked, config, H100))
    assert why == ""
    assert speed == float(f"{speed:.3g}")


@pytest.mark.parametrize("model", ["gpt-oss-20b", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_that_are_dequantized_while_loading_are_planned(model, method):
    assert find_config(recipe(model=model, method=method, offline=True), [])


def test_quantized_weights_of_a_folder_are_refused_without_a_list_of_names(
    tmp_path, tiny_model_dir
):
    values = json.loads((tiny_model_dir / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UntrainableWeights, match="gptq") as caught:
        find_config(recipe(model=str(tmp_path), offline=True), [tmp_path])
    assert "known without a network" not in caught.value.hint
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        find_config(recipe(model=str(tmp_path), offline=True), [tmp_path])
    assert "known without a network" not in caught.value.hint
