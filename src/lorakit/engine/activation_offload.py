"""Keep each layer's input of each micro-batch until its backward pass, on the GPU or offloaded.

Inputs that do not fit on the GPU are copied to pinned host memory and back on separate streams, two
at a time in each direction, so that the GPU holds at most two more than it works with.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lorakit.engine.host_memory import PageLocked, view_of

Key = tuple[int, int]  # layer, micro-batch
# Copies in flight in each direction; more would only use memory.
PREFETCH_DEPTH = 2


class LayerInputs:
    """A store of layer inputs by (layer, micro-batch).

    Args:
        on_gpu: number of last layers whose inputs stay on the GPU.
    """

    def __init__(self, layers: int, on_gpu: int, device: torch.device) -> None:
        self.first_on_gpu = layers - on_gpu
        self.device = device
        self.cuda = device.type == "cuda"
        self.rooms: dict[Key, PageLocked] = {}
        self.kept: dict[Key, Tensor] = {}
        self.shapes: dict[Key, Tensor] = {}
        self.leaving: deque[tuple[Any, Tensor]] = deque()
        self.coming: dict[Key, tuple[Any, Tensor]] = {}
        self.up = torch.cuda.Stream(device) if self.cuda else None
        self.down = torch.cuda.Stream(device) if self.cuda else None

    def put(self, key: Key, x: Tensor) -> None:
        """Store x, which must not be modified afterwards."""
        if key[0] >= self.first_on_gpu or not self.cuda:
            self.kept[key] = x
            return
        target = self._host_view(key, x)
        assert self.down is not None
        self.down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.down):
            target.copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.down)
        self.leaving.append((event, x))
        while len(self.leaving) > PREFETCH_DEPTH:
            # Work queued after the copy has finished may reuse the memory of x.
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[0])

    def settle(self) -> None:
        """Make work queued from here on wait for all copies to the host."""
        while self.leaving:
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[0])

    def fetch(self, keys: list[Key]) -> None:
        """Start copying back the first of `keys` not resident yet, at most `PREFETCH_DEPTH`."""
        for key in keys[:PREFETCH_DEPTH]:
            if key in self.kept or key in self.coming:
                continue
            assert self.up is not None
            assert self.down is not None
            x = torch.empty_like(self.shapes[key], device=self.device)
            self.up.wait_stream(torch.cuda.current_stream())
            self.up.wait_stream(self.down)
            with torch.cuda.stream(self.up):
                x.copy_(self._host_view(key, x), non_blocking=True)
                event = torch.cuda.Event()
                event.record(self.up)
            self.coming[key] = (event, x)

    def take(self, key: Key) -> Tensor:
        """Return and remove the tensor stored under `key`."""
        if key in self.kept or not self.cuda:
            return self.kept.pop(key)
        self.fetch([key])
        event, x = self.coming.pop(key)
        torch.cuda.current_stream().wait_event(event)
        return x

    def _host_view(self, key: Key, x: Tensor) -> Tensor:
        """Host memory for x; reused in the next step, and replaced if too small."""
        buffer = self.rooms.get(key)
        if buffer is None or buffer.bytes.numel() < x.nbytes:
            # The GPU may still read or write the old buffer.
            torch.cuda.synchronize()
            self.rooms.pop(key, None)
            buffer = self.rooms[key] = PageLocked(x.nbytes, self.device)
        self.shapes[key] = torch.empty(x.shape, dtype=x.dtype, device="meta")
        return view_of(buffer.bytes, 0, x)
