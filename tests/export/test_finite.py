"""One number that is none is found wherever it is, and named; so is one too large for a dtype."""

import math

import pytest
import torch

from lorakit.errors import WorkError
from lorakit.export.finite import cast, is_finite, require_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_is_enough(dtype, value):
    tensor = torch.zeros(3, 5, dtype=dtype)
    require_finite(tensor, "w")
    tensor[1, 2] = value
    assert not is_finite(tensor)
    with pytest.raises(WorkError, match=f"^w: {value} at element 7; nothing was kept"):
        require_finite(tensor, "w")


def test_integers_and_nothing_at_all_are_finite():
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.zeros(0))


def test_a_cast_that_loses_nothing():
    assert cast("w", torch.tensor([65504.0]), torch.float16, "").tolist() == [65504.0]
    assert cast("w", torch.tensor([7]), torch.float16, "").dtype == torch.int64


def test_a_number_beyond_the_dtype_is_named_with_what_to_do():
    with pytest.raises(WorkError, match=r"w: holds 7e\+04, but float16 ends at 65504") as caught:
        cast("w", torch.tensor([1.0, -70000.0]), torch.float16, "export with --dtype bfloat16")
    assert caught.value.hint == "export with --dtype bfloat16"


def test_what_was_no_number_before_the_cast_is_no_matter_of_the_dtype():
    with pytest.raises(WorkError, match="w: nan at element 0") as caught:
        cast("w", torch.tensor([math.nan]), torch.float16, "export with --dtype bfloat16")
    assert "damaged" in caught.value.hint
