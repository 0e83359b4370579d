"""One rank's part of a step, and the base's bytes."""

import pytest

from lorakit.planning.known_models import shape_config
from lorakit.planning.rank_workload import NF4_BYTES, RankWorkload, examples_of_rank
from lorakit.recipe.schema import Recipe
from lorakit.types import Device


def sizes(ranks=1, **values):
    recipe = Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})
    device = Device("cuda", "x", 2**30, "bfloat16", ranks=ranks)
    return RankWorkload.of(recipe, shape_config("llama-2-7b"), device)


@pytest.mark.parametrize(("ranks", "most"), [(1, 16), (2, 8), (3, 6), (5, 4), (16, 1), (64, 1)])
def test_the_rank_with_most_examples_has_its_share_rounded_up(ranks, most):
    found = sizes(ranks, micro_batch_size=4, gradient_accumulation_steps=4)
    assert examples_of_rank(found.recipe, ranks) == found.examples == most
    assert found.step_tokens == most * 2048
    assert found.tokens == min(4, most) * 2048
    assert found.inputs_bytes == most * 2048 * 4096 * 2


def test_the_base_is_counted_whole_whatever_the_ranks():
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert sizes().frozen_bytes == sizes(8).frozen_bytes == 2 * linear
    assert sizes(method="qlora").frozen_bytes == int(NF4_BYTES * linear)
