"""The measure itself: zero for equals, right for a known case, never negative, NaN an error."""

import math

import pytest
import torch

from lorakit.errors import WorkError
from lorakit.export.divergence import compare, divergences, summed


def logs(*rows):
    return torch.tensor(rows).log()


def test_kl_and_agreement_of_a_case_by_hand():
    p = [logs([0.5, 0.5], [0.9, 0.1]), logs([0.2, 0.8])]
    q = [logs([0.5, 0.5], [0.5, 0.5]), logs([0.8, 0.2])]
    kl, same, whole, positions = compare(p, q, "it")
    by_hand = 0.9 * torch.tensor(1.8).log() + 0.1 * torch.tensor(0.2).log()
    by_hand += 0.6 * torch.tensor(4.0).log()
    assert kl == pytest.approx(float(by_hand) / 3)
    assert (same, whole, positions) == (2 / 3, 0.5, 3)
    assert compare(p, p, "it") == (0.0, 1.0, 1.0, 3)


def test_predictions_apart_by_rounding_alone_are_never_below_zero():
    torch.manual_seed(0)
    p = torch.randn(64, 5000).log_softmax(-1)
    q = (p + 1e-6 * torch.randn_like(p)).float()
    found = divergences(p, q)
    assert bool((found >= 0).all())
    assert float(found.max()) < 1e-9


def test_what_cannot_be_said_counts_nothing_and_what_is_missed_counts_infinite():
    certain, open_ = logs([1.0, 0.0]), logs([0.5, 0.5])
    assert divergences(certain, open_).tolist() == pytest.approx([math.log(2)])
    assert divergences(certain, certain).tolist() == [0.0]
    assert divergences(open_, certain).tolist() == [math.inf]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_no_number_is_an_error_that_names_its_place(value):
    good = torch.tensor([0.1, 0.2]), torch.tensor([True, True])
    bad = torch.tensor([0.1, value, 0.2]), torch.tensor([True, False, True])
    with pytest.raises(WorkError, match=f"it: .*{value} at token 2 of the answer to .* prompt 2"):
        summed([good, bad, good], "it")


@pytest.mark.parametrize("side", [0, 1])
def test_one_nan_on_either_side_is_no_agreement(side):
    rows = [torch.randn(4, 8).log_softmax(-1) for _ in range(2)]
    rows[side][2, 3] = math.nan
    with pytest.raises(WorkError, match="nan at token 3"):
        compare([rows[0]], [rows[1]], "it")


def test_a_broken_tensor_of_the_model_is_named():
    model = torch.nn.Linear(2, 2)
    model.weight.data[1, 0] = -math.inf
    nan = torch.tensor([math.nan]), torch.tensor([False])
    with pytest.raises(WorkError, match="weight of the merged model: -inf at element 2"):
        summed([nan], "the merged model", model)
