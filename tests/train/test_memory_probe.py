"""The probe is as heavy as any micro-batch of the run can be."""

import random

import pytest
import torch

from lorakit.data.batching import Layout, step_batches
from lorakit.train.oom import longest_scored, reserve_optimizer_memory, worst_step
from lorakit.types import MemoryPlan

from .faults import examples


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_no_micro_batch_of_the_run_is_wider(packed, seed):
    draw = random.Random(seed)
    rows = examples([draw.randint(3, 60) for _ in range(80)])
    layout = Layout(pad_id=0, rows=3, capacity=3 * 60, packed=packed)
    (worst,) = worst_step(rows, layout, per_step=6).micro
    widest = 0
    for _ in range(50):
        step = step_batches(draw.sample(rows, 6), layout)
        widest = max([widest, *(m["input_ids"].numel() for m in step.micro)])
    # Six random examples may fill a pack to a token or two more than the longest do.
    assert worst["input_ids"].numel() >= widest - (3 if packed else 0)


def test_a_pack_is_filled_with_the_longest_that_fit():
    rows = examples([10, 50, 30, 45, 4, 4])
    layout = Layout(pad_id=0, rows=2, capacity=100, packed=True)
    assert [len(e.input_ids) for e in worst_step(rows, layout, 8).examples] == [50, 45, 4]
    assert [len(e.input_ids) for e in worst_step(rows, layout, 2).examples] == [50, 45]
    alone = Layout(pad_id=0, rows=1, capacity=20, packed=True)
    assert [len(e.input_ids) for e in worst_step(rows, alone, 8).examples] == [50]


def test_the_batch_scored_first_is_the_heaviest():
    rows = examples([10, 50, 30, 45])
    assert [len(e.input_ids) for e in longest_scored(rows, 100)] == [50, 45]
    assert [len(e.input_ids) for e in longest_scored(rows, 8)] == [50]


def test_on_a_cpu_no_room_is_held():
    plan = MemoryPlan({"optimizer state": 10}, 100, True)
    assert reserve_optimizer_memory(None, plan, torch.device("cpu")) is None
