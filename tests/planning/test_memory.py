"""The plan counts exactly what can be counted, from a config alone."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.measured import recipe_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from lorakit.errors import RecipeError
from lorakit.ops.cross_entropy import summed_cross_entropy
from lorakit.planning.known_models import shape_config
from lorakit.planning.memory import _planned, budget_of, plan_memory
from lorakit.planning.rank_workload import NF4_BYTES, RankWorkload
from lorakit.recipe.schema import Recipe
from lorakit.train.training_args import OPTIMIZERS
from lorakit.types import ON_GPU, OPTIMIZER_BYTES, Device, Placement

H100 = Device("cuda", "H100", 80 * 2**30, "bfloat16")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Names of fields in results that were measured before they were renamed.
NOW = {"layer_major": "layerwise", "inputs_on_card": "inputs_on_gpu"}


def plan_of(asked, config, device, keep, placement):
    """The plan of a choice already made."""
    return _planned(RankWorkload.of(asked, config, device), tuple(keep), placement, device)


def recipe(method="lora", **changes):
    values = {"model": "m", "data": "d", "target_modules": TARGETS, "method": method}
    return Recipe(**values, gradient_checkpointing=False).model_copy(update=changes)


def test_llama_2_7b_weights_are_counted_to_the_byte():
    plan = plan_memory(recipe(), shape_config("llama-2-7b"), H100)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan.parts["frozen weights"] == 2 * linear
    other = 2 * 32000 * 4096 + 65 * 4096  # embedding, head, norms
    assert plan.parts["embeddings, head and norms"] == 2 * other
    adapters = 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    assert plan.parts["adapters (float32)"] == 4 * adapters == 4 * 39_976_960
    assert plan.parts["optimizer state"] == 8 * adapters


def test_nf4_takes_about_a_quarter_of_bf16():
    lora = plan_memory(recipe(), shape_config("llama-2-7b"), H100).parts["frozen weights"]
    qlora = plan_memory(recipe("qlora"), shape_config("llama-2-7b"), H100).parts["frozen weights"]
    assert qlora / lora == pytest.approx(NF4_BYTES / 2, rel=1e-6)
    assert qlora == pytest.approx(3.341e9, rel=1e-3)


def test_tied_embeddings_are_counted_once_and_small_gpus_are_refused():
    small = Device("cuda", "small", 2**30, "bfloat16")
    plan = plan_memory(recipe(), shape_config("smollm2-135m"), small)
    weights = plan.parts["frozen weights"] + plan.parts["embeddings, head and norms"]
    assert weights == 2 * 134_515_008
    assert not plan_memory(recipe(), shape_config("llama-2-7b"), small).fits


@pytest.mark.parametrize("name", OPTIMIZER_BYTES)
def test_optimizer_state_is_that_of_the_real_optimizer(name, tmp_path):
    """One step of the class that the trainer takes, on a pair of rank 16 as wide as a 1B model."""
    pair = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 2048), (2048, 16))]
    arguments = TrainingArguments(str(tmp_path), optim=OPTIMIZERS.get(name, name), use_cpu=True)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{name}: {str(error)[:60]}")
    optimizer = kind(pair, **settings)
    for parameter in pair:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    storages = {
        value.untyped_storage().data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    real = sum(storages.values()) / sum(p.numel() for p in pair)
    planned = OPTIMIZER_BYTES[name]
    if name == "adafactor":  # a row and a column of sums; one is as long as the rank
        assert 0.5 * planned <= real <= planned
    else:
        assert real == pytest.approx(planned, rel=0.06)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_plan_fits_only_what_the_gpu_has(method):
    config = shape_config("llama-2-7b")
    takes = plan_memory(recipe(method), config, H100).total_bytes
    for share, fits in ((1.2, True), (0.99, False)):
        card = replace(H100, memory_bytes=int(share * takes))
        assert plan_memory(recipe(method), config, card).fits is fits
    for limit, fits in ((1.2, True), (0.99, False)):
        asked = recipe(method, memory_limit=f"{int(limit * takes / 1e6)}MB")
        assert plan_memory(asked, config, H100).fits is fits


def test_a_plan_holds_every_parameter_of_a_mixture_of_experts():
    """30,532,122,624 of them by the model's card, in two bytes each; few train."""
    asked = recipe(target_modules=["q_proj"])
    parts = plan_memory(asked, shape_config("qwen3-30b-a3b"), H100).parts
    held = ("frozen weights", "embeddings, head and norms", "experts (not quantized)")
    assert sum(parts[name] for name in held) == 2 * 30_532_122_624


class Alive(TorchDispatchMode):
    """The most bytes that results of operations took at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def test_logits_of_a_head_that_trains_are_counted_as_often_as_they_live():
    """Their log-softmax, its gradient, and the gradient of the logits, all in float32."""
    tokens, width, vocabulary = 48, 4, 50_000
    head = torch.nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(tokens, width, requires_grad=True)
    with Alive() as alive:
        summed_cross_entropy(hidden, torch.arange(tokens), head).backward()
    copies = alive.most / (4 * tokens * vocabulary)
    config = shape_config("llama-2-7b")
    asked = recipe(fused_layers="off", cutoff_len=tokens, micro_batch_size=1)
    planned = plan_memory(asked, config, H100).parts["logits of one chunk"]
    assert planned == pytest.approx(copies * 4 * tokens * config.vocab_size, rel=0.05)


@pytest.mark.parametrize("order", [1, -1])
def test_work_is_that_of_the_layer_with_most(order):
    config = shape_config("llama-2-7b")
    asked = recipe(micro_batch_size=4)

    def work(keep):
        return plan_of(asked, config, H100, keep, ON_GPU).parts["work of one layer, or the loss"]

    least, _, _, most = (work([level] * 32) for level in range(4))
    assert least < most
    assert work(([0] * 31 + [3])[::order]) == most


def test_what_is_kept_is_the_sum_over_the_layers():
    config = shape_config("llama-2-7b")

    def kept(keep):
        parts = plan_of(recipe(), config, H100, keep, ON_GPU).parts
        return parts["activations kept for backward"]

    each = [kept([level] * 32) / 32 for level in range(4)]
    assert each == sorted(set(each), reverse=True)
    mixed = [0] * 5 + [1] * 7 + [2] * 9 + [3] * 11
    expected = 5 * each[0] + 7 * each[1] + 9 * each[2] + 11 * each[3]
    assert kept(mixed) == pytest.approx(expected, rel=1e-6)


LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # numbers of a Llama-2-7B layer
PAIRS = 16 * (4 * 8192 + 3 * (4096 + 11008))  # of its adapters of rank 16


def test_one_layer_of_a_quantized_base_is_dequantized_at_a_time():
    config = shape_config("llama-2-7b")
    for method, size in (("qlora", 2 * LAYER), ("lora", None)):
        parts = plan_memory(recipe(method), config, H100).parts
        assert parts.get("one layer dequantized") == size


def test_inputs_of_layers_lie_here_or_there():
    """What a step's tokens are between layers: on the card for some, on the host for the rest."""
    config, layer = shape_config("llama-2-7b"), 8 * 2048 * 4096 * 2
    for kept in (0, 5, 32):
        placement = Placement(True, True, True, False, kept, 8192, 32)
        plan = plan_of(recipe(), config, H100, [3] * 32, placement)
        assert plan.host_parts["inputs of layers"] == (32 - kept) * layer
        # Three micro-batches of 8,192 tokens are under way in any case.
        assert plan.parts["inputs of layers"] == max(kept * layer, 3 * layer // 2)


def test_adapters_on_the_host_come_to_the_gpu_two_layers_at_a_time():
    config = shape_config("llama-2-7b")
    placement = Placement(True, True, True, True, 0, 8192, 32)
    plan = plan_of(recipe(), config, H100, [3] * 32, placement)
    # Values and gradients in float32; a copy of one layer's values in the base's type.
    assert plan.parts["adapters and gradients of two layers"] == 2 * (4 + 4) * PAIRS
    assert plan.parts["adapters (copy in the base's type)"] == 2 * PAIRS
    held = [plan.host_parts[name] for name in ("adapters (float32)", "gradients (float32)")]
    assert held == [4 * 32 * PAIRS] * 2
    assert plan.host_parts["optimizer state"] == 8 * 32 * PAIRS
    assert not {"adapters (float32)", "optimizer state"} & plan.parts.keys()


def test_recomputation_saves_activations():
    config = shape_config("llama-2-7b")
    for engine, key in (
        ("off", "activations (estimate)"),
        ("auto", "activations kept for backward"),
    ):
        kept = plan_memory(recipe(fused_layers=engine), config, H100)
        again = plan_memory(recipe(fused_layers=engine, gradient_checkpointing=True), config, H100)
        assert again.parts[key] < kept.parts[key] / 5
        assert set(kept.keep) == {0}
        assert set(again.keep) == {3}


@pytest.mark.parametrize("limit", [15, 15.2, 16, 17, 18, 19, 30])
def test_auto_fills_the_limit_and_recomputes_no_more_than_it_must(limit):
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", memory_limit=f"{limit}GiB")
    plan = plan_memory(asked, config, H100)
    assert plan.fits
    assert plan.total_bytes <= budget_of(asked, H100) < limit * 2**30
    if limit == 30:
        assert plan.describe() == "nothing recomputed"
    elif limit > 15.2:  # what is left over is less than one layer's next larger tensor
        assert plan.total_bytes > budget_of(asked, H100) - 0.2 * 2**30


def test_the_embedding_goes_to_the_host_last():
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", memory_limit="15GiB")
    plan = plan_memory(asked, config, H100)
    assert plan.placement.embedding_on_host
    assert not plan.placement.layerwise
    assert plan.fits
    assert "host memory" in plan.describe()


@pytest.mark.parametrize(("method", "smallest"), [("lora", 3.0), ("qlora", 2.4)])
def test_below_that_layers_take_the_whole_step_one_by_one(method, smallest):
    """Less on the card at each notch, never more than the limit, until nothing is left to move."""
    config = shape_config("llama-2-7b")
    moved = 0
    for limit in (8.0, 6.0, 5.0, 4.0, smallest):
        asked = Recipe(
            model="m", data="d", method=method, target_modules=TARGETS, memory_limit=f"{limit}GiB"
        )
        plan = plan_memory(asked, config, H100)
        assert plan.fits, limit
        assert plan.total_bytes <= limit * 2**30
        assert plan.placement.layerwise
        assert "layer by layer" in plan.describe()
        here = len(plan.placement.describe(len(plan.keep)))
        assert here >= moved
        moved = here
        assert plan.host_bytes > 0
    assert plan.placement.base_on_host
    assert not plan_memory(asked.model_copy(update={"memory_limit": "2GiB"}), config, H100).fits


def test_streaming_is_had_on_request_and_kept_away_on_request():
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", weight_offload="on")
    plan = plan_memory(asked, config, H100)
    assert plan.placement.base_on_host
    # A card with room to spare keeps every layer's inputs.
    assert plan.placement.inputs_on_gpu == 32
    for changes in ({"use_dora": True}, {"fused_layers": "off"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(RecipeError, match="weight_offload: on needs the fast layers"):
            plan_memory(recipe(weight_offload="on", **changes), config, H100)
    on_cpu = Device("cpu", "x", 64 * 2**30, "float32")
    assert plan_memory(recipe(weight_offload="on"), config, on_cpu).placement.base_on_host
    never = recipe(gradient_checkpointing="auto", weight_offload="off", memory_limit="9GiB")
    assert not plan_memory(never, config, H100).fits
    # bitsandbytes' optimizers know no host.
    eight = recipe(gradient_checkpointing="auto", optimizer="adamw_8bit", memory_limit="3.2GiB")
    assert not plan_memory(eight, config, H100).placement.adapters_on_host
    # Modules trained in full have no place in this order of work.
    full = recipe(gradient_checkpointing="auto", modules_to_save=["lm_head"], memory_limit="9GiB")
    assert not plan_memory(full, config, H100).placement.layerwise


@pytest.mark.parametrize("path", sorted(RESULTS.glob("memory_*.json")), ids=lambda p: p.stem)
def test_runs_within_a_budget_stay_within_it_and_near_the_plan(path):
    row = json.loads(path.read_text())
    recipe = recipe_of(row)
    config = shape_config(row["shape"])
    placement = Placement(**{NOW.get(name, name): v for name, v in row["placement"].items()})
    measured = row["peak_process_gib"] * 2**30
    assert measured <= recipe.memory_limit_bytes
    plan = plan_of(recipe, config, H100, row["keep"], placement)
    assert plan.total_bytes == pytest.approx(measured, rel=0.10)


def ranks(count, nodes=1, gib=80, kind="cuda"):
    return Device(kind, "x", gib * 2**30, "bfloat16", ranks=count, nodes=nodes)


def auto(method="lora", **changes):
    return recipe(method, gradient_checkpointing="auto", **changes)


def test_several_gpus_hold_what_one_holds_and_what_joins_them():
    config = shape_config("llama-2-7b")
    one, two = (plan_memory(auto(), config, device) for device in (H100, ranks(2)))
    assert set(two.parts) - set(one.parts) == {"NCCL buffers"}
    assert {name: two.parts[name] for name in one.parts} == one.parts
    assert two.placement == one.placement


def test_a_micro_batch_is_no_larger_than_a_ranks_part_of_the_step():
    config = shape_config("llama-2-7b")
    asked = recipe(micro_batch_size=4, gradient_accumulation_steps=2)
    kept = "activations kept for backward"
    for count, rows in ((2, 4), (3, 3), (4, 2), (8, 1), (32, 1)):
        shared = plan_memory(asked, config, ranks(count)).parts[kept]
        single = recipe(micro_batch_size=rows, gradient_accumulation_steps=1)
        assert shared == plan_memory(single, config, H100).parts[kept], count
    streamed = asked.model_copy(update={"weight_offload": "on"})
    whole, part = (plan_memory(streamed, config, d).parts for d in (H100, ranks(4)))
    assert part["hidden states of a step"] * 4 == whole["hidden states of a step"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_too_large_for_one_gpu_is_spread_over_those_of_a_node(method):
    """Before anything goes to host memory but inputs and the embedding."""
    config = shape_config("llama-3.3-70b")
    gib = 79 if method == "lora" else 24
    plan = plan_memory(auto(method), config, ranks(16, nodes=2, gib=gib))
    assert plan.fits
    assert plan.placement.layerwise
    assert plan.placement.shards == 8
    assert not plan.placement.base_on_host
    assert "each layer's weights sharded over 8 GPUs" in plan.describe()
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    whole = linear * (2 if method == "lora" else NF4_BYTES)
    assert plan.parts["frozen weights"] == pytest.approx(whole / 8, rel=1e-6)
    assert plan.parts["two layers, gathered"] == pytest.approx(whole / 40, rel=1e-6)
    alone = plan_memory(auto(method), config, ranks(1, gib=gib))
    assert alone.placement.base_on_host
    one_a_node = plan_memory(auto(method), config, ranks(16, nodes=16, gib=gib))
    assert one_a_node.placement.base_on_host


def test_sharding_is_had_on_request_and_kept_away_on_request():
    config = shape_config("llama-2-7b")
    for checkpointing in ("auto", True, False):
        asked = recipe(sharding="on", gradient_checkpointing=checkpointing)
        assert plan_memory(asked, config, ranks(4)).placement.shards == 4
    on_cpu = plan_memory(recipe(sharding="on"), config, ranks(2, gib=64, kind="cpu"))
    assert on_cpu.placement.shards == 2
    assert "NCCL buffers" not in on_cpu.parts
    never = auto(sharding="off", memory_limit="8GiB")
    assert plan_memory(never, config, ranks(2)).placement.base_on_host
    spread = plan_memory(auto(weight_offload="off", memory_limit="10GiB"), config, ranks(2))
    assert (spread.fits, spread.placement.shards) == (True, 2)
    assert not plan_memory(
        never.model_copy(update={"weight_offload": "off"}), config, ranks(2)
    ).fits
    full = auto(modules_to_save=["lm_head"], memory_limit="9GiB")
    assert plan_memory(full, config, ranks(2)).placement.shards == 1


def test_processes_on_a_cpu_share_its_memory():
    config = shape_config("tiny")
    plan = plan_memory(recipe(fused_layers="on"), config, ranks(4, gib=8, kind="cpu"))
    assert plan.available_bytes == 2 * 2**30
    apart = plan_memory(recipe(fused_layers="on"), config, ranks(4, nodes=4, gib=8, kind="cpu"))
    assert apart.available_bytes == 8 * 2**30
