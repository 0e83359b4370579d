"""One buffer holds every gradient: the groups' sinks and the parameters' .grad are its parts."""

import torch
from tests.engine.engine_models import tiny

from lorakit.engine.attach import attach_engine
from lorakit.engine.lora_linear import FlatGradients


def test_sinks_and_grads_are_views_of_one_buffer():
    model = tiny(modules_to_save=["lm_head"])
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = FlatGradients(parameters, engine.groups)
    assert flat.flat.numel() == sum(p.numel() for p in parameters)
    flat.begin()
    for number, group in enumerate(engine.groups):
        group.a_sink += number + 1
        group.b_sink += 100 + number
    for number, group in enumerate(engine.groups):
        for own in group.adapted:
            assert bool((own.a.grad == number + 1).all())
            assert bool((own.b.grad == 100 + number).all())
    flat.begin()
    assert not flat.flat.any()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
