"""Layers' bytes, in host memory or spread over ranks, enter; each layer's on the card leaves.

There are two places: while the card computes with one layer, the next one's bytes travel into the
other on a stream of their own. Two events a place keep the order: copied before it is read, read
before it is overwritten. On a CPU the same happens without streams, so that tests run this code.

A size enters; host memory leaves that a card copies from and to at full speed, beside its work.

Ordinary memory goes through the driver's own buffer at 6.5 GB/s and holds the caller up; locked
memory took 52 GB/s either way on an H100 machine (benchmarks/results/time_link.json). Locking
costs 0.08 s a GB, once. torch's `pin_memory` rounds up to powers of two, which is too much for
tens of GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class HostBuffer(Protocol):
    """Where a layer's bytes are while it is not at work."""

    @property
    def size(self) -> int: ...

    def fill(self, place: Tensor) -> None:
        """Start bringing all `size` of them into `place`."""


class DoubleBuffer:
    """Two places on `device` that hold one of `rooms` each, by turns."""

    def __init__(self, rooms: Sequence[HostBuffer], device: torch.device) -> None:
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


class PageLocked:
    """`size` bytes of host memory, locked while this object lives if `device` is a card."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.locked = False
        if device.type == "cuda" and size:
            code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
            # Refused (a limit of the system): copies still work, at the speed of ordinary memory.
            self.locked = int(code) == 0

    @property
    def size(self) -> int:
        """Bytes that `fill` writes."""
        return self.bytes.numel()

    def fill(self, place: Tensor) -> None:
        """Start copying everything into `place`."""
        place.copy_(self.bytes, non_blocking=True)

    def __del__(self) -> None:
        if getattr(self, "locked", False):
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


def view_of(room: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of `room` from `start` on as a tensor of the shape and type of `like`."""
    return room[start : start + like.nbytes].view(like.dtype).view(like.shape)
