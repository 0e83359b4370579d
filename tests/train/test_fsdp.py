"""FSDP is chosen in one place, and what contradicts it is named; numbers: test_ranks_end_to_end."""

import types

import pytest

from lorakit.data.batching import Layout
from lorakit.distributed.launch_env import REQUIRED
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import RecipeError, RunError
from lorakit.recipe.loader import load_recipe
from lorakit.train.fsdp import check_launch, with_equal_micro_batches, with_launcher_settings
from lorakit.train.step_inputs import step_inputs
from lorakit.types import Device

TWO = Device("cuda", "H100", 80 * 2**30, "bfloat16", {"kind": "card"}, ranks=2)
LAUNCHED = dict.fromkeys(REQUIRED, "2")


@pytest.fixture
def environment(monkeypatch):
    def put(**values):
        for name, value in {**LAUNCHED, **values}.items():
            monkeypatch.setenv(name, value)

    return put


def recipe(**values):
    return load_recipe({"model": "m", "data": "d", **values})


def refused(device=TWO, **values):
    with pytest.raises(RecipeError) as caught:
        check_launch(recipe(**values).recipe, device)
    return caught.value.message


def test_settings_that_contradict_fsdp_are_named():
    check_launch(recipe(fsdp={}).recipe, TWO)
    alone = Device("cuda", "H100", 80 * 2**30, "bfloat16", {})
    assert "this run has one" in refused(alone, fsdp={})
    assert "method: qlora is not supported: the packed 4-bit" in refused(fsdp={}, method="qlora")
    for key in ("fused_layers", "sharding", "weight_offload"):
        assert f"fsdp and {key}: on both decide" in refused(fsdp={}, **{key: "on"})
    cpu = Device("cpu", "Xeon", 2**30, "float32", {}, ranks=2)
    assert "cpu_offload has no effect" in refused(cpu, fsdp={"cpu_offload": True})


def test_fields_that_do_not_exist_or_have_another_place_are_named():
    assert "reshard: unknown field" in refused(fsdp={"reshard": True})
    assert "gradient_checkpointing decides it" in refused(fsdp={"activation_checkpointing": True})
    assert "adapters are saved as on one GPU" in refused(fsdp={"state_dict_type": "FULL"})
    assert "expected true or false (found: 'yes')" in refused(fsdp={"cpu_offload": "yes"})


def test_fsdp_config_is_another_name_and_deepspeed_leads_there():
    assert recipe(fsdp_config={"cpu_offload": True}).recipe.fsdp == {"cpu_offload": True}
    with pytest.raises(RecipeError, match=r"deepspeed.*fsdp"):
        recipe(deepspeed={"zero_optimization": {"stage": 3}})


def test_the_options_of_accelerate_launch_count_only_in_a_launch(environment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in REQUIRED:
        monkeypatch.delenv(name, raising=False)
    assert with_launcher_settings(recipe()).recipe.fsdp is None
    environment(FSDP_OFFLOAD_PARAMS="true")
    taken = with_launcher_settings(recipe())
    assert taken.recipe.fsdp == {"reshard_after_forward": True, "cpu_offload": True}
    assert "accelerate launch" in taken.origins["fsdp"]
    assert with_launcher_settings(recipe(fsdp={"cpu_offload": True})).recipe.fsdp


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed's engine owns backward pass"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "transformers' models"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "fused_layers decides"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "gradient_checkpointing of the recipe decides it",
        ),
    ],
)
def test_options_that_cannot_be_are_named(environment, values, words):
    environment(**values)
    with pytest.raises(RunError, match=words):
        with_launcher_settings(recipe())


@pytest.mark.parametrize(("asked", "right"), [("bf16", True), ("no", True), ("fp16", False)])
def test_two_precisions_are_one_message(environment, asked, right):
    environment(ACCELERATE_MIXED_PRECISION=asked)
    if right:
        check_launch(recipe().recipe, TWO)
    else:
        assert "dtype has two sources: it is bfloat16" in refused()


def test_every_rank_runs_as_many_micro_batches():
    rows = [
        {"input_ids": [5] * n, "labels": [5] * n, "source": "d", "row": n} for n in (9, 2, 2, 2)
    ]
    layout = Layout(0, 1, 64, packed=False)
    steps = []
    for rank in range(2):
        ranks = DistributedContext(rank, 2, 2)
        ready = step_inputs(rows, layout, ranks)
        steps.append((ready, with_equal_micro_batches(ready, layout, ranks)))
    assert [len(before.own.micro) for before, _ in steps] == [1, 3]
    assert [len(after.own.micro) for _, after in steps] == [3, 3]
    added = steps[0][1].own.micro[1:]
    assert all(micro["targets"].numel() == micro["positions"].numel() == 0 for micro in added)
    assert all(micro["input_ids"].tolist() == [[5, 5]] for micro in added)


def test_a_micro_batch_without_targets_changes_no_gradient(tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    from lorakit.train.loss import attach_loss

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    attach_loss(model)
    none = torch.zeros(0, dtype=torch.long)
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), positions=none, targets=none).loss_sum
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_a_model_that_does_not_name_its_layers_is_refused(monkeypatch):
    import torch

    from lorakit.train import fsdp

    decoder = torch.nn.Linear(2, 2)
    model = types.SimpleNamespace(_no_split_modules=None, get_decoder=lambda: decoder)
    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", lambda *_: None)
    with pytest.raises(RecipeError, match="does not name its decoder layers"):
        fsdp.shard_base(model, {}, TWO)
