"""An objective of token losses has the gradients of autograd, layer by layer too."""

import pytest
import torch
from tests.engine.engine_models import examples, tiny, worst

from lorakit.data.batching import collate, pack
from lorakit.engine.chunked_layer import ChunkSize
from lorakit.engine.cuda_graphs import to_bucket
from lorakit.engine.layerwise import LayerwiseSchedule
from lorakit.engine.token_objective import loss_and_sums, model_inputs
from lorakit.train.loss import attach_loss
from lorakit.types import Placement


class Contrast:
    """A curved function of all token losses, and the sum of its inputs as a metric."""

    inputs = frozenset({"signs"})
    metrics = 1

    def __call__(self, token_losses, micro):
        value = (token_losses * micro["signs"]).sum()
        return torch.nn.functional.softplus(value / 10), token_losses.detach().sum().view(1)


def micros():
    batches = [pack(examples([23, 40, 7])), collate(examples([31, 50]), 0)]
    for batch in batches:
        count = len(batch["targets"])
        batch["signs"] = torch.where(torch.arange(count) < count // 3, 1.0, -0.2)
    return batches


def test_the_model_does_not_get_what_the_objective_reads():
    (batch, _), objective = micros(), Contrast()
    assert batch.keys() - model_inputs(objective, batch).keys() == {"signs"}


def test_a_rank_without_micro_batches_has_no_metrics():
    loss, sums = loss_and_sums(torch.zeros(()), Contrast())
    assert (loss.item(), sums.tolist()) == (0.0, [0.0])
    loss, sums = loss_and_sums(torch.tensor([2.0, 5.0]), Contrast())
    assert (loss.item(), sums.tolist()) == (2.0, [5.0])
    assert loss_and_sums(torch.tensor(3.0), None)[1] is None


@pytest.mark.parametrize("cut", [ChunkSize(10_000, 8), ChunkSize(16, 1)])
def test_layer_by_layer_gives_the_gradients_of_autograd(cut):
    objective, scale = Contrast(), 0.5
    model = tiny("llama")
    attach_loss(model)
    torch.manual_seed(4)
    totals = torch.zeros(2)
    for batch in micros():
        inputs = model_inputs(objective, batch)
        losses = model(**inputs, use_cache=False, per_token=True).token_losses
        loss, sums = objective(losses, batch)
        (loss * scale).backward()
        totals += torch.cat([loss.detach().view(1) * scale, sums])
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    other = tiny("llama")
    attached = attach_loss(other, "on", torch.device("cpu"), Placement(layerwise=True))
    parameters = [p for p in other.parameters() if p.requires_grad]
    schedule = LayerwiseSchedule(
        attached.engine, attached.head, parameters, cut, objective=objective
    )
    torch.manual_seed(4)
    found = schedule(micros(), scale)
    torch.testing.assert_close(found, totals, rtol=1e-5, atol=1e-5)
    grads = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    assert worst(grads, expected) < 1e-5


def test_padding_for_graphs_belongs_to_a_sequence_with_no_loss():
    batch = pack(examples([23, 40, 7]))
    count = len(batch["targets"])
    batch["sequence"] = torch.arange(count) % 3
    padded = to_bucket(batch)
    assert len(padded["sequence"]) == len(padded["targets"]) > count
    assert torch.equal(padded["sequence"][:count], batch["sequence"])
    assert (padded["targets"][count:] < 0).all()
