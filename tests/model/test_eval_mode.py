"""No dropout and no gradient inside; the mode that was before comes back, come what may."""

import pytest
import torch

from lorakit.model.eval_mode import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_even_after_an_error(training):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train(training)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training
        assert not model[1].training
        assert not model(torch.ones(1, 2)).requires_grad
        1 / 0  # noqa: B018
    assert model.training is training
    assert torch.is_grad_enabled()
