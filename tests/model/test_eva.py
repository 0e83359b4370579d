"""EVA: adapters start from the principal directions of their layers' inputs in the data."""

import json

import pytest
import torch
from tests.families import tiny_config

from lorakit.errors import RunError
from lorakit.model.eva import eva_weights, set_lora_a
from lorakit.model.lora_config import add_adapter
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS
from lorakit.types import IGNORE, Example, Origin

RANK = 4


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("qwen3")).float()
    names = ["q_proj", "k_proj", "down_proj"]
    asked = Recipe(
        model="m", data="d", init_lora_weights="eva", target_modules=names, lora_r=RANK,
        rank_pattern={"k_proj": 3},
    )  # fmt: skip
    return add_adapter(base, asked)


def examples(count, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ids = torch.randint(5, 90, (length + row % 3,), generator=generator).tolist()
        labels = [IGNORE if i < 10 else token for i, token in enumerate(ids)]
        made.append(Example(ids, labels, Origin("x.jsonl", row)))
    return made


def inputs_of(model, rows):
    """Inputs at supervised tokens by module, one row at a time."""
    seen = {}

    def keep(name, mask):
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0][0][mask])

    for row in rows:
        mask = torch.tensor(row.labels) != IGNORE
        hooks = [
            layer.base_layer.register_forward_pre_hook(keep(name, mask))
            for name, layer in model.named_modules()
            if getattr(layer, "lora_A", None)
        ]
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_the_rows_of_lora_a_are_the_first_singular_vectors_of_the_inputs(model):
    rows = examples(6)
    found = eva_weights(model, rows, seed=0)
    expected = inputs_of(model, rows)
    assert found.keys() == expected.keys()
    assert any(len(value) == 3 for value in found.values())
    for name, value in found.items():
        assert captured(expected[name], value) > 0.999
        torch.testing.assert_close(value @ value.T, torch.eye(len(value)), atol=1e-4, rtol=0)


def captured(inputs, directions):
    """Energy of `inputs` along orthonormal `directions`, of the most that as many can have."""
    best = torch.linalg.svdvals(inputs)[: len(directions)].square().sum()
    return (inputs @ directions.T).square().sum() / best


def test_batches_are_merged(model, monkeypatch):
    monkeypatch.setattr("lorakit.model.eva.BATCH_TOKENS", 60)
    rows = examples(9)
    parts, together = eva_weights(model, rows, 0), inputs_of(model, rows)
    assert all(captured(together[name], value) > 0.9 for name, value in parts.items())


def test_the_product_stays_zero_and_repeats(model):
    torch.manual_seed(5)
    found = eva_weights(model, examples(6), 0)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))  # the run's random numbers are not used up
    again = eva_weights(model, examples(6), 0)
    assert all(torch.equal(found[name], again[name]) for name in found)
    set_lora_a(model, found)
    for name, value in found.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, value)
        assert not layer.lora_B["default"].weight.any()


def test_too_few_tokens_are_an_error(model):
    row = examples(1)[0]
    short = Example(row.input_ids, [IGNORE] * 22 + row.labels[22:], row.origin)
    with pytest.raises(RunError, match=r"eva: 2 trained tokens give 2 directions, .* needs 4"):
        eva_weights(model, [short], 0)


def test_a_run_starts_from_its_data_and_saves_a_plain_adapter(finish):
    asked = {"max_steps": 1, "learning_rate": 1e-12, "lora_r": 4}
    plain = finish(**asked).run
    run = finish(**asked, init_lora_weights="eva").run
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not config.get("eva_config")
    from safetensors.torch import load_file

    ours, random = (
        load_file(run.adapter / ADAPTER_WEIGHTS),
        load_file(plain.adapter / ADAPTER_WEIGHTS),
    )
    first = next(name for name in ours if "lora_A" in name)
    norms = ours[first].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=0)
    assert not torch.allclose(ours[first], random[first], atol=1e-2)
