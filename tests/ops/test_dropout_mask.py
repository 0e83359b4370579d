"""The dropout mask: right share, no pattern, a mask of its own for every key."""

import itertools

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys, keep_mask, threshold


def keys(count):
    torch.manual_seed(0)
    return draw_keys(count, torch.device("cpu"))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p):
    mask = keep_mask(keys(1)[0], 1000, 1000, p)
    # One standard deviation of the share is sqrt(p (1-p) / 10^6) <= 0.0005.
    assert (~mask).float().mean().item() == pytest.approx(p, abs=0.002)


def test_rows_and_columns_have_the_share_too():
    dropped = (~keep_mask(keys(1)[0], 2000, 2000, 0.1)).float()
    for means in (dropped.mean(0), dropped.mean(1)):
        # sqrt(0.09 / 2000) = 0.0067; five deviations over 2,000 means, and their own spread.
        assert (means - 0.1).abs().max() < 5 * 0.0067
        assert means.std().item() == pytest.approx(0.0067, rel=0.1)


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (0, 2), (1, 1), (0, 64), (16, 0)])
def test_neighbors_are_independent(shift):
    dropped = (~keep_mask(keys(1)[0], 1024, 1024, 0.5)).float() - 0.5
    moved = torch.roll(dropped, shift, (0, 1))
    assert abs((dropped * moved).mean().item()) < 5 * 0.25 / 1024


def test_masks_of_different_keys_are_independent():
    masks = [(~keep_mask(k, 512, 512, 0.5)).float() - 0.5 for k in keys(8)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first * second).mean().item()) < 5 * 0.25 / 512


def test_each_half_of_a_key_gives_another_mask():
    first, second = keys(2).tolist()
    mixed = [(first[0], first[1]), (first[0], second[1]), (second[0], first[1])]
    masks = [keep_mask(torch.tensor(key), 512, 512, 0.5).float() - 0.5 for key in mixed]
    for one, other in itertools.combinations(masks, 2):
        assert abs((one * other).mean().item()) < 5 * 0.25 / 512


def test_the_same_key_gives_the_same_mask_and_the_generator_decides_the_keys():
    first, second = keys(3), keys(3)
    assert torch.equal(first, second)
    assert torch.equal(keep_mask(first[1], 9, 7, 0.3), keep_mask(second[1], 9, 7, 0.3))
    assert not torch.equal(draw_keys(3, torch.device("cpu")), second)


def test_threshold_covers_its_ends():
    assert threshold(0.0) == 0
    assert threshold(1.0) == 2**32 - 1
