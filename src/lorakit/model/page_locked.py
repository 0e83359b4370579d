"""A size enters; host memory leaves that a card copies from and to at full speed, beside its work.

Ordinary memory goes through the driver's own buffer at 6.5 GB/s and holds the caller up; locked
memory took 52 GB/s either way on an H100 machine (benchmarks/results/time_link.json). Locking
costs 0.08 s a GB, once. torch's `pin_memory` rounds up to powers of two, which is too much for
tens of GB.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
