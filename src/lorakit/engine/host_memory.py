"""Pinned host memory, and a double buffer that copies layers' bytes to the GPU.

While the GPU computes with one layer, the next one's bytes are copied to the other buffer on a
separate stream. Two events per buffer keep the order: copied before it is read, read before it is
overwritten. On a CPU the same code runs without streams, so that tests cover it.

Copies of pageable memory go through the driver's staging buffer at 6.5 GB/s and block the caller;
pinned memory reached 52 GB/s in either direction on an H100 machine
(benchmarks/results/time_link.json). Pinning costs 0.08 s per GB, once. torch's `pin_memory` rounds
sizes up to powers of two, which is too much for tens of GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class HostBuffer(Protocol):
    """Storage of a layer's bytes while the layer does not work."""

    @property
    def size(self) -> int: ...

    def fill(self, place: Tensor) -> None:
        """Start copying all `size` bytes into `place`."""


class DoubleBuffer:
    """Two buffers on `device` that alternately hold the bytes of one of `rooms`."""

    def __init__(self, rooms: Sequence[HostBuffer], device: torch.device) -> None:
        self.rooms = rooms
        size = max(room.size for room in rooms)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.resident: list[int | None] = [None, None]
        self.in_use = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = [_event(self.stream) for _ in range(2)]
        self.left = [_event(self.stream) for _ in range(2)]

    def prefetch(self, number: int) -> int | None:
        """Start copying layer `number` to the unused buffer; return the layer it displaces."""
        if number in self.resident:
            return None
        slot = 1 - self.in_use
        displaced, self.resident[slot] = self.resident[slot], number
        source = self.rooms[number]
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            if self.stream is not None:
                self.stream.wait_event(self.left[slot])
            source.fill(self.buffers[slot][: source.size])
            if self.stream is not None:
                self.copied[slot].record(self.stream)
        return displaced

    def acquire(self, number: int) -> tuple[Tensor, int | None]:
        """Make layer `number`'s bytes available on the GPU to work queued from here on.

        They stay until another layer but one is acquired.

        Returns:
            (the bytes, the layer that was displaced or None).
        """
        if self.stream is not None:
            # Work queued so far may read the buffer in use; the next copy into it waits.
            self.left[self.in_use].record()
        displaced = self.prefetch(number)
        self.in_use = self.resident.index(number)
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.copied[self.in_use])
        return self.buffers[self.in_use][: self.rooms[number].size], displaced

    def forget(self) -> None:
        """Invalidate both buffers after their sources were written."""
        self.resident = [None, None]


def _event(stream: Any) -> Any:
    return torch.cuda.Event() if stream is not None else None


class PageLocked:
    """`size` bytes of host memory, pinned while this object lives if `device` is a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.locked = False
        if device.type == "cuda" and size:
            code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
            # Refused (a system limit): copies still work, at the speed of pageable memory.
            self.locked = int(code) == 0

    @property
    def size(self) -> int:
        """Bytes that `fill` copies."""
        return self.bytes.numel()

    def fill(self, place: Tensor) -> None:
        """Start copying all bytes into `place`."""
        place.copy_(self.bytes, non_blocking=True)

    def __del__(self) -> None:
        if getattr(self, "locked", False):
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


def view_of(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """View the bytes of `buffer` from `start` on as a tensor of the shape and dtype of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
