"""Expected speed against the measured rows, and its direction on other cards."""

import json
from pathlib import Path

import pytest
from tests.families import FAMILIES, tiny_config

from lorakit.model.shapes import shape_config
from lorakit.planning import throughput
from lorakit.planning.cards import CARDS, card_device, several
from lorakit.planning.throughput import estimate_speed, expected_speed
from lorakit.planning.training import plan_training
from lorakit.recipe import Recipe
from lorakit.records import Device, MemoryPlan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KINDS = ("engine", "baseline", "scale")
ROWS = [path for kind in KINDS for path in sorted(RESULTS.glob(f"{kind}_*.json"))]


def speed(recipe, shape, card, gpus=1):
    config, device = shape_config(shape), card_device(CARDS[card], None, recipe.dtype)
    device = several(device, gpus, None, None)
    plan = plan_training(recipe, config, device)
    return expected_speed(recipe, config, device, plan, CARDS[card])


@pytest.mark.parametrize("path", ROWS, ids=lambda p: p.stem)
def test_measured_rows(path):
    row = json.loads(path.read_text())
    if row.get("lengths") == "mixed":
        pytest.skip("the plan speaks of full rows; mixed lengths ran 10% below it")
    engine = {"engine": "off"} if path.stem.startswith("baseline") else {}
    asked = Recipe(**{**row["recipe"], "model": "m", "data": "d", **engine})
    found = speed(asked, row["shape"], "h100", row.get("gpus", 1))
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.12)
    assert (
        "estimate" if row.get("placement", {}).get("layer_major") else "measured"
    ) in found.basis


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})


def test_other_cards_are_estimates_in_the_order_of_their_rates():
    order = ["3060", "4070", "4090", "a100-80", "h100", "b200"]
    found = [speed(recipe(method="qlora"), "llama-2-7b", card) for card in order]
    rates = [s.tokens_per_second for s in found]
    assert rates == sorted(rates)
    assert "estimate" in found[0].basis


def test_recomputation_long_rows_and_streaming_cost_speed():
    plain = speed(recipe(), "llama-2-7b", "h100").tokens_per_second
    again = speed(recipe(gradient_checkpointing=True), "llama-2-7b", "h100").tokens_per_second
    long = speed(recipe(cutoff_len=32768), "llama-2-7b", "h100").tokens_per_second
    streamed = speed(recipe(streaming="on", gradient_accumulation_steps=1), "llama-2-7b", "h100")
    assert again < plain
    assert long < plain
    assert streamed.tokens_per_second < 0.7 * plain
    assert "streamed" in streamed.basis


def test_a_token_meets_few_experts():
    dense, sparse = (
        speed(recipe(), name, "b200").tokens_per_second for name in ("gemma-2-9b", "qwen3-30b-a3b")
    )
    assert sparse > dense


def test_nothing_is_said_of_an_unknown_card():
    device = card_device(None, 24 * 2**30, "auto")
    config = shape_config("llama-2-7b")
    asked = recipe()
    assert expected_speed(asked, config, device, plan_training(asked, config, device), None) is None


CPU = Device("cpu", "CPU", 16 * 2**30, "float32", "sdpa")
H100 = card_device(CARDS["h100"], None, "auto")
PLAN = MemoryPlan({}, 2**40, True, keep=(0,) * 4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("device", [H100, CPU], ids=["h100", "cpu"])
def test_every_kind_of_layer_has_an_estimate(name, device):
    card = CARDS["h100"] if device is H100 else None
    found, why = estimate_speed(recipe(), tiny_config(name), device, PLAN, card)
    assert why == ""
    assert found.tokens_per_second > 0


def test_layers_that_were_not_measured_are_called_an_estimate():
    for name, measured in (("qwen3", True), ("qwen3_5", False), ("qwen3_moe", False)):
        found = expected_speed(recipe(), tiny_config(name), H100, PLAN, CARDS["h100"])
        assert ("measured on this card" in found.basis) is measured
        assert ("no such layers were measured" in found.basis) is not measured


def test_what_cannot_be_estimated_is_left_out_with_the_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("'head_dim' is a per-layer attribute\nand more")

    monkeypatch.setattr(throughput, "count", broken)
    config = tiny_config("qwen3")
    for device, card in ((H100, CARDS["h100"]), (CPU, None)):
        found, why = estimate_speed(recipe(), config, device, PLAN, card)
        assert found is None
        assert why == "the layers of qwen3 cannot be read: 'head_dim' is a per-layer attribute"
        assert expected_speed(recipe(), config, device, PLAN, card) is None


def test_an_unknown_gpu_is_named_in_the_reason():
    device = card_device(None, 24 * 2**30, "auto")
    found, why = estimate_speed(recipe(), tiny_config("qwen3"), device, PLAN, None)
    assert found is None
    assert device.name in why
