"""One loaded base for several runs: shared weights, separate modules, loaded again if changed."""

import pytest
import torch

from lorakit.hardware import detect_device
from lorakit.model import shared_base
from lorakit.model.load import load_base, locate_model
from lorakit.model.lora_config import add_adapter
from lorakit.model.shared_base import SharedBase, checksums, copy_modules

CPU = detect_device("float32", prefer="cpu")


@pytest.fixture(params=["lora", "qlora"])
def taken(request, tiny_recipe, tiny_model_dir, tmp_path):
    """`taken(**values)` takes the base for a run; `taken.shared` is the shared base."""
    shared = SharedBase()

    def take(on_host=False, **values):
        values = {"method": request.param, "target_modules": ["q_proj", "v_proj"], **values}
        recipe = tiny_recipe(tiny_model_dir, "none.jsonl", tmp_path, **values).recipe
        return recipe, shared.take(recipe, locate_model(recipe), CPU, on_host)

    take.shared = shared
    return take


def test_runs_share_weights_but_not_modules(taken):
    recipe, first = taken()
    model = add_adapter(first, recipe)
    assert any("lora" in name for name, _ in model.named_parameters())
    _, second = taken()
    assert taken.shared.loads == 1
    assert not any("lora" in name for name, _ in second.named_parameters())
    weight = first.model.layers[0].mlp.up_proj.weight
    assert second.model.layers[0].mlp.up_proj.weight is weight
    assert second.model.layers[0] is not first.model.layers[0]
    second.model.layers[0].forward = None
    assert first.model.layers[0].forward is not None


def test_a_copy_computes_the_same_bits(taken):
    recipe, copied = taken()
    loaded = load_base(recipe, locate_model(recipe), CPU)
    ids = torch.tensor([[5, 99, 1000, 7]])
    with torch.no_grad():
        assert torch.equal(copied(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert checksums(copied) == checksums(loaded)


def test_a_changed_weight_is_loaded_again(taken):
    _, base = taken()
    name, parameter = next(iter(base.named_parameters()))
    parameter.data.view(-1).view(torch.uint8)[3] ^= 1
    assert checksums(base)[name] != taken.shared._sums[name]
    _, again = taken()
    assert taken.shared.loads == 2
    assert checksums(again) == taken.shared._sums


def test_a_run_finds_the_base_as_it_was_loaded(taken):
    _, base = taken()
    before = [parameter.requires_grad for parameter in base.parameters()]
    base.requires_grad_(False)
    base.eval()
    base.config.use_cache = False
    _, again = taken()
    assert [parameter.requires_grad for parameter in again.parameters()] == before
    assert again.config.use_cache
    assert taken.shared.loads == 1


def test_a_base_that_draws_numbers_while_it_loads_is_not_shared(taken, monkeypatch):
    def drawing(*args):
        torch.rand(1)
        return load_base(*args)

    monkeypatch.setattr(shared_base, "load_base", drawing)
    taken(), taken()
    assert taken.shared.loads == 2


def test_loading_draws_no_numbers(taken):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    taken()
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_in_host_memory_are_not_shared(taken):
    taken(on_host=True), taken(on_host=True)
    assert taken.shared.loads == 2


def test_released_weights_are_freed(taken):
    _, base = taken()
    taken.shared.release()
    assert taken.shared._base is None
    copied = copy_modules(base)
    assert next(copied.parameters()) is next(base.parameters())
