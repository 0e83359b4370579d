"""Layers' bytes, in host memory or spread over ranks, enter; each layer's on the card leaves.

There are two places: while the card computes with one layer, the next one's bytes travel into the
other on a stream of their own. Two events a place keep the order: copied before it is read, read
before it is overwritten. On a CPU the same happens without streams, so that tests run this code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class Room(Protocol):
    """Where a layer's bytes are while it is not at work."""

    @property
    def size(self) -> int: ...

    def fill(self, place: Tensor) -> None:
        """Start bringing all `size` of them into `place`."""


class Slots:
    """Two places on `device` that hold one of `rooms` each, by turns."""

    def __init__(self, rooms: Sequence[Room], device: torch.device) -> None:
        self.rooms = rooms
        size = max(room.size for room in rooms)
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.in_use = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = [_event(self.stream) for _ in range(2)]
        self.left = [_event(self.stream) for _ in range(2)]

    def prefetch(self, number: int) -> int | None:
        """Start copying layer `number` into the place not in use; returns whom it displaces."""
        if number in self.holds:
            return None
        place = 1 - self.in_use
        displaced, self.holds[place] = self.holds[place], number
        room = self.rooms[number]
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            if self.stream is not None:
                self.stream.wait_event(self.left[place])
            room.fill(self.places[place][: room.size])
            if self.stream is not None:
                self.copied[place].record(self.stream)
        return displaced

    def acquire(self, number: int) -> tuple[Tensor, int | None]:
        """(layer `number`'s bytes on the card for the work queued from here on, whom it displaced).

        They stay until the next but one other layer is asked for.
        """
        if self.stream is not None:
            # What was queued so far may read the place in use; the next copy into it waits.
            self.left[self.in_use].record()
        displaced = self.prefetch(number)
        self.in_use = self.holds.index(number)
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.copied[self.in_use])
        return self.places[self.in_use][: self.rooms[number].size], displaced

    def forget(self) -> None:
        """The rooms were written: what the places hold is out of date."""
        self.holds = [None, None]


def _event(stream: Any) -> Any:
    return torch.cuda.Event() if stream is not None else None
