"""Two places take turns: what was asked for is there, and what is in use is never overwritten."""

import pytest
import torch

from lorakit.engine.host_memory import DoubleBuffer, PageLocked

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def rooms(device, count=5, size=64):
    made = [PageLocked(size, torch.device(device)) for _ in range(count)]
    for number, room in enumerate(made):
        room.bytes.fill_(number + 1)
    return made


@pytest.mark.parametrize("device", DEVICES)
def test_up_and_down_every_layer_is_the_right_one(device):
    slots = DoubleBuffer(rooms(device), torch.device(device))
    order = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 3]
    for at, number in enumerate(order):
        found, _ = slots.acquire(number)
        if at + 1 < len(order):
            slots.prefetch(order[at + 1])
        assert set(found.tolist()) == {number + 1}


def test_a_prefetch_leaves_the_one_in_use_alone_and_names_whom_it_displaces():
    slots = DoubleBuffer(rooms("cpu"), torch.device("cpu"))
    _, displaced = slots.acquire(0)
    assert displaced is None
    assert slots.prefetch(1) is None
    assert slots.acquire(1)[1] is None
    assert slots.prefetch(2) == 0
    assert slots.prefetch(2) is None  # under way already
    assert slots.prefetch(3) == 2  # asked for, never used
    assert set(slots.acquire(1)[0].tolist()) == {2}


def test_what_was_written_in_the_room_is_copied_anew_once_forgotten():
    made = rooms("cpu")
    slots = DoubleBuffer(made, torch.device("cpu"))
    slots.acquire(0)
    made[0].bytes.fill_(99)
    assert set(slots.acquire(0)[0].tolist()) == {1}
    slots.forget()
    assert set(slots.acquire(0)[0].tolist()) == {99}
