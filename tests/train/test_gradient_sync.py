"""What a step's examples, gradients and wishes become when several ranks share them."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.errors import WorkError
from lorakit.train.gradient_sync import (
    GradientSync,
    assert_parameters_in_sync,
    local_examples,
    partition_examples,
    seed_per_rank,
)
from lorakit.train.signals import StopRequest
from lorakit.types import Example, Origin


class Pair(DistributedContext):
    """One rank of two, the other of which is played: what it adds, and what it gathers."""

    def __init__(self, adds=(), gathers=(), number=0):
        super().__init__(number, 2, 2)
        self.adds, self.gathers = list(adds), list(gathers)

    def all_reduce_(self, tensor):
        tensor += torch.tensor(self.adds.pop(0))

    def all_gather_object(self, thing):
        return [thing, self.gathers.pop(0)]


@given(st.lists(st.integers(1, 4000), max_size=40), st.integers(1, 9))
def test_every_example_is_given_once_whatever_the_number_of_ranks(lengths, count):
    given_out = partition_examples(lengths, count)
    assert len(given_out) == count
    assert sorted(place for places in given_out for place in places) == list(range(len(lengths)))
    assert all(places == sorted(places) for places in given_out)


def test_equal_examples_are_given_evenly_and_unequal_ones_by_their_work():
    assert [len(p) for p in partition_examples([100] * 8, 4)] == [2, 2, 2, 2]
    lengths = [2000, 500, 500, 500, 500]
    assert sorted(sorted(lengths[i] for i in p) for p in partition_examples(lengths, 2)) == [
        [500, 500, 500, 500],
        [2000],
    ]


def test_one_row_for_two_ranks_leaves_one_without_work():
    rows = [Example([1, 2], [1, 2], Origin("d", 1))]
    assert [len(local_examples(rows, DistributedContext(n, 2, 2))) for n in (0, 1)] == [1, 0]
    assert local_examples(rows, SINGLE_PROCESS) == rows


def test_gradients_and_losses_add_up_and_wishes_count_for_all():
    together = GradientSync(Pair(adds=[[10.0, 20.0], [0.5, 1.0, 0.0]]), StopRequest())
    flat = torch.tensor([1.0, 2.0])
    loss = together.add([flat], torch.tensor(0.25))
    assert flat.tolist() == [11.0, 22.0]
    assert float(loss) == 0.75
    assert together.should_stop  # the other rank got the signal
    assert together.exit_code == 128 + signal.SIGTERM


def test_gradients_of_every_buffer_add_up():
    """With adapters on the host there is one a layer."""
    together = GradientSync(
        Pair(adds=[[10.0], [20.0, 30.0], [40.0], [0.0, 0.0, 0.0]]), StopRequest()
    )
    buffers = [torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4.0])]
    together.add(buffers, torch.tensor(0.0))
    assert [b.tolist() for b in buffers] == [[11.0], [22.0, 33.0], [44.0]]


def test_alone_nothing_travels():
    stop = StopRequest()
    together = GradientSync(SINGLE_PROCESS, stop)
    loss = torch.tensor(1.0)
    assert together.add([torch.ones(2)], loss) is loss
    assert not together.should_stop
    stop.signal = signal.SIGINT
    assert together.should_stop
    assert together.exit_code == 130
    assert [together.agree_to_save(due) for due in (True, False)] == [True, False]


def test_the_clock_of_rank_0_lets_all_save_one_step_later_and_once():
    together = GradientSync(Pair(adds=[[0.0], [0.0, 0.0, 0.0]] * 3), StopRequest())
    saved = []
    for _ in range(3):  # the clock of rank 0 has rung, and rings until a save is through
        together.add([torch.zeros(1)], torch.tensor(0.0))
        saved.append(together.agree_to_save(not any(saved)))
    assert saved == [False, True, False]


def test_the_clock_of_another_rank_lets_nobody_save():
    together = GradientSync(Pair(adds=[[0.0], [0.0, 0.0, 0.0]] * 3, number=1), StopRequest())
    saved = []
    for _ in range(3):
        together.add([torch.zeros(1)], torch.tensor(0.0))
        saved.append(together.agree_to_save(True))
    assert saved == [False] * 3


def test_masks_differ_by_rank_and_those_of_rank_0_are_those_of_one_process():
    torch.manual_seed(5)
    alone = torch.rand(4)
    drawn = []
    for number in range(3):
        torch.manual_seed(5)
        seed_per_rank(5, DistributedContext(number, 3, 3))
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], alone)
    assert len({tuple(d.tolist()) for d in drawn}) == 3


def test_adapters_that_drifted_apart_are_not_saved():
    weights = [torch.nn.Parameter(torch.ones(3))]
    assert_parameters_in_sync(SINGLE_PROCESS, weights, 7)
    with pytest.raises(
        WorkError, match="step 7: the adapters of rank 1 differ from those of rank 0"
    ):
        assert_parameters_in_sync(Pair(gathers=["other"]), weights, 7)


@pytest.mark.parametrize("tensor", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 4])
def test_one_bit_of_any_tensor_is_a_drift(tensor, place):
    def weights():
        return [torch.nn.Parameter(torch.full((5,), 1.0 + i)) for i in range(3)]

    class Other(DistributedContext):
        """Rank 1, which only tells its hash."""

        def all_gather_object(self, thing):
            told.append(thing)
            return [thing]

    told, drifted = [], weights()
    drifted[tensor].data.view(torch.int32)[place] += 1
    assert_parameters_in_sync(Other(1, 2, 2), weights(), 7)
    assert_parameters_in_sync(Other(1, 2, 2), drifted, 7)
    assert_parameters_in_sync(Pair(gathers=told[:1]), weights(), 7)
    with pytest.raises(WorkError, match="adapters of rank"):
        assert_parameters_in_sync(Pair(gathers=told[1:]), weights(), 7)
