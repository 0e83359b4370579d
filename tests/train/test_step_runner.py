"""Each way of computing a step gives the same gradients, and starts over after a failure."""

from dataclasses import replace

import pytest
import torch
from tests.engine.engine_models import examples, tiny

from lorakit.data.batching import Layout, step_batches
from lorakit.engine.cuda_graphs import GraphedMicroSteps
from lorakit.engine.layerwise import LayerwiseSchedule
from lorakit.train.loss import attach_loss
from lorakit.train.step_runner import MicroSteps, choose_step_runner
from lorakit.types import ON_GPU, Placement

CPU = torch.device("cpu")
LAYERWISE = Placement(layerwise=True, tokens_at_once=16, heads_at_once=1)
WAYS = [
    ("off", ON_GPU, MicroSteps, 1),
    ("on", ON_GPU, MicroSteps, 1),
    ("on", LAYERWISE, LayerwiseSchedule, 1),
    ("on", replace(LAYERWISE, adapters_on_host=True), LayerwiseSchedule, 3),  # one a layer
]


def runner_of(engine, placement, ranks=2):
    """A runner for a tiny model, and the model's trained parameters by name."""
    model = tiny()
    model.train()
    attached = attach_loss(model, engine, CPU, placement)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def forward_backward(micro, scale):
        loss = model(**micro, use_cache=False).loss_sum * scale
        loss.backward()
        return loss.detach()

    runner = choose_step_runner(
        forward_backward, attached, list(trained.values()), placement, CPU, ranks=ranks
    )
    return runner, trained


def micro_batches():
    return step_batches(examples([9, 14, 5, 11]), Layout(0, 2, 32, packed=False)).micro


def gradients(trained):
    return {n: p.grad.clone() for n, p in trained.items()}


@pytest.mark.parametrize(("engine", "placement", "kind", "buffers"), WAYS)
def test_every_way_gives_the_gradients_of_plain_autograd(engine, placement, kind, buffers):
    plain, expected = runner_of("off", ON_GPU, ranks=1)
    loss = plain(micro_batches(), 0.01)
    runner, trained = runner_of(engine, placement)
    assert type(runner) is kind
    assert float(runner(micro_batches(), 0.01)) == pytest.approx(float(loss), rel=1e-5)
    for name, grad in gradients(trained).items():
        torch.testing.assert_close(grad, expected[name].grad, rtol=1e-3, atol=1e-6)
    # Each trained number once, in the buffers that ranks sum.
    assert len(runner.gradients) == buffers
    assert sum(b.numel() for b in runner.gradients) == sum(p.numel() for p in trained.values())
    assert {b.dtype for b in runner.gradients} == {torch.float32}


@pytest.mark.parametrize(("engine", "placement", "kind", "buffers"), WAYS)
def test_a_step_after_a_reset_equals_the_first(engine, placement, kind, buffers):
    runner, trained = runner_of(engine, placement)
    loss = runner(micro_batches(), 0.01)
    before = gradients(trained)
    runner.reset()
    assert torch.equal(runner(micro_batches(), 0.01), loss)
    assert all(torch.equal(grad, before[n]) for n, grad in gradients(trained).items())


def test_a_single_rank_needs_no_buffer_and_nothing_is_kept_after_a_reset():
    runner, trained = runner_of("off", ON_GPU, ranks=1)
    runner(micro_batches(), 0.01)
    assert runner.gradients == []
    runner.reset()
    assert all(p.grad is None for p in trained.values())


def test_each_way_describes_itself():
    assert runner_of("on", LAYERWISE)[0].describe() == "layer by layer"
    assert "PCIe" in runner_of("on", LAYERWISE)[0].slow_reason
    plain = runner_of("off", ON_GPU)[0]
    assert (plain.describe(), plain.slow_reason) == ("no CUDA graphs", None)
    graphs = GraphedMicroSteps(
        lambda *_: None, [torch.nn.Parameter(torch.ones(2))], [], lambda m: m
    )
    assert (graphs.describe(), graphs.slow_reason) == ("0 CUDA graphs", None)
    graphs.failed = "capture failed"
    assert graphs.slow_reason == "no CUDA graphs: capture failed"
