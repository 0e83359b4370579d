"""Cards are found by what people and drivers call them; the others are refused with the list."""

import pytest

from lorakit.errors import RecipeError
from lorakit.planning.gpus import (
    GIB,
    GPUS,
    find_gpu,
    gpu_device,
    match_gpu,
    parse_memory,
    with_gpu_count,
)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("a100", "a100-40"),
        ("a100-80", "a100-80"),
        ("A10G", "a10"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_names(said, name):
    assert find_gpu(said).name == name


@pytest.mark.parametrize("said", ["GeForce RTX 4090 Laptop GPU", "RTX 3060 Ti", "rtx4900", "", "x"])
def test_other_gpus_are_not_taken_for_them(said):
    assert match_gpu(said) is None
    with pytest.raises(RecipeError, match="not in the table") as caught:
        find_gpu(said)
    assert "a100-80" in caught.value.hint
    assert "--memory" in caught.value.hint


def test_memory_tells_two_gpus_of_one_name_apart():
    assert match_gpu("NVIDIA A100", 79 * GIB).name == "a100-80"
    assert match_gpu("NVIDIA A100", 39 * GIB).name == "a100-40"


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda c: c.name)
def test_a_gpu_is_a_device_with_a_type_it_can_multiply(card):
    device = gpu_device(card, None, "auto")
    assert device.dtype == ("bfloat16" if card.capability >= (8, 0) else "float16")
    assert device.memory_bytes == int(card.memory_gib * GIB)
    assert gpu_device(card, None, "bfloat16").dtype == device.dtype
    assert gpu_device(card, 5 * GIB, "float16").memory_bytes == 5 * GIB
    assert 0.3 < card.utilization < 0.8


def test_sizes_are_read_with_their_unit():
    assert parse_memory("12GB") == 12 * 10**9
    assert parse_memory("1.5 GiB") == int(1.5 * GIB)
    assert parse_memory("500MB") == 500 * 10**6
    assert parse_memory("512MiB") == 512 * 2**20
    for text in ("12", "GB", "-3GB", "0GB", "12 gigs"):
        with pytest.raises(RecipeError, match="--memory"):
            parse_memory(text)


@pytest.mark.parametrize("card", GPUS.values(), ids=lambda c: c.name)
def test_a_ring_is_no_faster_than_its_wires(card):
    assert card.ring == ("NVLink" if card.nvlink_gbs else "PCIe")
    assert card.ring_gbs == (card.nvlink_gbs or card.link_gbs / 2)
    assert card.ring_gbs < card.memory_gbs


def test_several_devices_of_one_kind():
    one = gpu_device(GPUS["h100"], None, "auto")
    assert with_gpu_count(one, None, None, None) == one
    found = with_gpu_count(one, 8, 4, 400)
    assert (found.ranks, found.nodes, found.per_node, found.network_gbits) == (32, 4, 8, 400)
    assert with_gpu_count(one, None, 2, None).ranks == 2
    assert found.rank_bytes == one.memory_bytes
    for nodes, network in ((None, 100), (1, 100), (4, 0), (4, -1)):
        with pytest.raises(RecipeError, match="--network"):
            with_gpu_count(one, 8, nodes, network)
