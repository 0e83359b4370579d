"""Each layer's input of each micro-batch enters on the way up; it comes back on the way down.

Where a layer's inputs have no room on the card they travel to page-locked host memory and back on
streams of their own, two at a time each way, so that the card holds two more than it works with.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lorakit.engine.host_memory import PageLocked, view_of

Key = tuple[int, int]  # layer, micro-batch
# Copies under way in each direction; more would only hold memory.
PREFETCH_DEPTH = 2


class LayerInputs:
    """A store of tensors by (layer, micro-batch).

    Args:
        on_card: so many of the last layers keep theirs on the card.
    """

    def __init__(self, layers: int, on_card: int, device: torch.device) -> None:
        self.first_on_card = layers - on_card
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
        """Keep x, which must not be written afterwards."""
        if key[0] >= self.first_on_card or not self.cuda:
            self.kept[key] = x
            return
        target = self._room(key, x)
        assert self.down is not None
        self.down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.down):
            target.copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.down)
        self.leaving.append((event, x))
        while len(self.leaving) > PREFETCH_DEPTH:
            # Its memory may be taken again by what is queued after the copy is through.
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[0])

    def settle(self) -> None:
        """All copies to the host are through for what is queued from here on."""
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
                x.copy_(self._room(key, x), non_blocking=True)
                event = torch.cuda.Event()
                event.record(self.up)
            self.coming[key] = (event, x)

    def take(self, key: Key) -> Tensor:
        """What was put under `key`; given out once."""
        if key in self.kept or not self.cuda:
            return self.kept.pop(key)
        self.fetch([key])
        event, x = self.coming.pop(key)
        torch.cuda.current_stream().wait_event(event)
        return x

    def _room(self, key: Key, x: Tensor) -> Tensor:
        """Host memory for x; kept for the next step, larger if it has to be."""
        room = self.rooms.get(key)
        if room is None or room.bytes.numel() < x.nbytes:
            # The card may still read or write the old one.
            torch.cuda.synchronize()
            self.rooms.pop(key, None)
            room = self.rooms[key] = PageLocked(x.nbytes, self.device)
        self.shapes[key] = torch.empty(x.shape, dtype=x.dtype, device="meta")
        return view_of(room.bytes, 0, x)
