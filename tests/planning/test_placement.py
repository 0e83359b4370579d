"""Choices come cheapest first; what is asked for by name and cannot be is refused."""

import pytest

from lorakit.errors import RecipeError
from lorakit.planning.known_models import shape_config
from lorakit.planning.placement import check_placement, placement_candidates
from lorakit.planning.rank_workload import RankWorkload
from lorakit.recipe.schema import Recipe
from lorakit.types import ON_GPU, Device


def sizes(ranks=1, nodes=1, kind="cuda", shape="llama-2-7b", **values):
    recipe = Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})
    device = Device(kind, "x", 80 * 2**30, "bfloat16", ranks=ranks, nodes=nodes)
    return RankWorkload.of(recipe, shape_config(shape), device)


def places(found):
    """The order of placements, each run of equals once."""
    order = []
    for _, placement in placement_candidates(found, engine=True):
        word = "card"
        if placement.layerwise:
            word = "host" if placement.base_on_host else f"spread {placement.shards}"
        elif placement != ON_GPU:
            word = "embedding"
        if not order or order[-1] != word:
            order.append(word)
    return order


def test_on_the_gpu_then_spread_then_in_host_memory():
    assert places(sizes(4)) == ["card", "embedding", "spread 4", *["spread 1", "host"] * 4]
    assert places(sizes()) == ["card", "embedding", *["spread 1", "host"] * 4]
    assert places(sizes(8, nodes=2))[2] == "spread 4"
    assert places(sizes(2, nodes=2)) == places(sizes())


def test_recipes_choose():
    assert places(sizes(4, sharding="on")) == ["spread 4"]
    assert places(sizes(4, weight_offload="on")) == ["host"]
    assert places(sizes(4, sharding="off")) == places(sizes())
    assert places(sizes(4, weight_offload="off")) == ["card", "embedding", "spread 4"]
    assert places(sizes(2, kind="cpu")) == ["card"]
    assert places(sizes(2, kind="cpu", sharding="on")) == ["spread 2"]
    assert places(sizes(4, gradient_checkpointing=True)) == ["card"]


@pytest.mark.parametrize(
    ("length", "heads"), [(2048, 32), (32767, 32), (32768, 16), (65536, 8), (2**21, 1)]
)
def test_long_rows_go_through_attention_in_groups_of_heads(length, heads):
    found = list(placement_candidates(sizes(weight_offload="on", cutoff_len=length), engine=True))
    assert {placement.heads_at_once for _, placement in found} == {heads}


def test_an_optimizer_of_gpus_stays_there():
    found = list(placement_candidates(sizes(2, sharding="on", optimizer="adamw_8bit"), engine=True))
    assert not any(placement.adapters_on_host for _, placement in found)
    plain = list(placement_candidates(sizes(2, sharding="on"), engine=True))
    assert plain[-1][1].adapters_on_host


@pytest.mark.parametrize(
    ("given", "engine", "said", "hint"),
    [
        ({"sharding": "on"}, True, "needs several GPUs in a machine, there is one", "--gpus N"),
        (
            {"sharding": "on", "ranks": 4, "nodes": 4},
            True,
            "several GPUs in a machine, each of 4 nodes has one",
            "sharding: auto",
        ),
        ({"sharding": "on", "ranks": 2}, False, "sharding: on needs the fast layers", "sharding:"),
        (
            {"weight_offload": "on"},
            False,
            "weight_offload: on needs the fast layers",
            "weight_offload: auto",
        ),
        (
            {"sharding": "on", "weight_offload": "on", "ranks": 2},
            True,
            "not from both",
            "one of them",
        ),
        (
            {"sharding": "on", "ranks": 2, "modules_to_save": ["lm_head"]},
            True,
            "modules_to_save and trainable_tokens do not go",
            "sharding: auto",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, engine, said, hint):
    with pytest.raises(RecipeError, match=said) as caught:
        check_placement(sizes(**given), engine)
    assert hint in caught.value.hint


def test_what_can_be_is_not():
    for given in ({}, {"sharding": "on", "ranks": 2}, {"weight_offload": "on", "ranks": 2}):
        check_placement(sizes(**given), engine=True)
    check_placement(sizes(ranks=2), engine=False)
