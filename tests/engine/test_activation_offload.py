"""What goes up comes back down, once, wherever it lay in between."""

import pytest
import torch

from lorakit.engine.activation_offload import LayerInputs

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_gpu", [0, 1, 3])
def test_every_tensor_comes_back_as_it_was(device, on_gpu):
    inputs = LayerInputs(3, on_gpu, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 9, 7):  # steps of other sizes find the room of the last one
        sent = {}
        for key in [(layer, at) for layer in range(3) for at in range(4)]:
            sent[key] = torch.randn(rows + key[1], 6, generator=generator)
            inputs.put(key, sent[key].to(device))
        inputs.settle()
        order = [(layer, at) for layer in (2, 1, 0) for at in range(4)]
        while order:
            key = order.pop(0)
            found = inputs.take(key)
            inputs.fetch(order)
            assert torch.equal(found.cpu(), sent[key])
        assert not inputs.kept
        assert not inputs.coming


def test_a_tensor_is_given_out_once():
    inputs = LayerInputs(1, 0, torch.device("cpu"))
    inputs.put((0, 0), torch.ones(2))
    inputs.take((0, 0))
    with pytest.raises(KeyError):
        inputs.take((0, 0))
