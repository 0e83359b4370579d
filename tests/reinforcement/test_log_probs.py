"""Log-probabilities of completions: those of the plain model, and of the reference."""

import pytest
import torch

from lorakit.data.batching import Layout
from lorakit.errors import WorkError
from lorakit.reinforcement.log_probs import ReferenceWeights, completion_log_probs
from lorakit.reinforcement.rollout_batch import plain_example
from lorakit.reinforcement.rollouts import Completion
from lorakit.types import Origin

LAYOUT = Layout(pad_id=0, rows=2, capacity=64, packed=False)


class Numbers(torch.nn.Module):
    """log p of a target is its id divided by -10."""

    def log_probs(self, micro):
        assert not self.training
        assert not torch.is_grad_enabled()
        return micro["targets"] / -10


def examples():
    ids = ([3, 1], [4], [5, 9, 2])
    made = [Completion(i, [0.0] * len(i), 0.0, False) for i in ids]
    return [plain_example([7, 8], completion, Origin("d", 1)) for completion in made]


@pytest.mark.parametrize("packed", [False, True])
def test_values_return_to_their_examples(packed):
    model = Numbers()
    layout = Layout(0, 2, 64, packed)
    found = completion_log_probs(model, examples(), layout, model.log_probs)
    expected = [[-0.3, -0.1], [-0.4], [-0.5, -0.9, -0.2]]
    for values, wanted in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted)
    assert model.training


def test_memory_that_runs_out_halves_micro_batches():
    model, sizes = Numbers(), []

    def limited(micro):
        sizes.append(len(micro["input_ids"]))
        if len(micro["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return model.log_probs(micro)

    assert len(completion_log_probs(model, examples(), LAYOUT, limited)) == 3
    assert sizes == [2, 1, 1, 1]

    def never(micro):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(WorkError, match="out of memory computing log-probabilities"):
        completion_log_probs(model, examples(), LAYOUT, never)


def test_the_reference_has_the_values_of_the_start_and_leaves_no_trace():
    parameter = torch.nn.Parameter(torch.zeros(3))
    reference = ReferenceWeights([parameter])
    with torch.no_grad():
        parameter.add_(0.1)
    present = parameter.detach().clone()
    with reference.active():
        assert not parameter.any()
    assert torch.equal(parameter, present)
