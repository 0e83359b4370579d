"""The fast layers' frozen weights enter, wherever they lie; they leave as views that move.

Weights live in page-locked host memory, one piece a layer. `enter(n)` points the modules of layer n
at their copy on the card (`Slots`); everyone else's point at the host, so that what reads weights
(savers, fingerprints) always finds the right ones. NF4 weights travel packed, with their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.model.lora_group import LoraGroup
from lorakit.model.page_locked import PageLocked, view_of
from lorakit.model.slots import Slots

_ALIGNED = 256


class StreamedBase:
    """The frozen weights of each layer's groups, in host memory and by turns on the card."""

    def __init__(self, layers: list[list[LoraGroup]], device: torch.device) -> None:
        self.layers = layers
        self.rooms: list[PageLocked] = []
        self.on_host: list[list[list[Tensor]]] = []
        for groups in layers:
            tensors = [group.frozen() for group in groups]
            size = sum(_round(t.nbytes) for own in tensors for t in own)
            room = PageLocked(size, device)
            views = _views(room.bytes, tensors)
            for group, theirs, ours in zip(groups, tensors, views, strict=True):
                for source, target in zip(theirs, ours, strict=True):
                    target.copy_(source)
                group.point_to(ours)
                group.constants_to_device()
            self.rooms.append(room)
            self.on_host.append(views)
        self.slots = Slots(self.rooms, device)

    def enter(self, number: int, following: int | None = None) -> None:
        """Layer `number` is on the card for the work queued from here on, `following` under way."""
        place, displaced = self.slots.acquire(number)
        self._send_home(displaced)
        views = _views(place, self.on_host[number])
        for group, own in zip(self.layers[number], views, strict=True):
            group.point_to(own)
        if following is not None:
            self._send_home(self.slots.prefetch(following))

    def rest(self) -> None:
        """Point every module at its weights in host memory."""
        for number in range(len(self.layers)):
            self._send_home(number)

    def _send_home(self, number: int | None) -> None:
        if number is not None:
            for group, own in zip(self.layers[number], self.on_host[number], strict=True):
                group.point_to(own)


def _views(room: Tensor, tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Tensors of these shapes and types, one after another in `room`."""
    start, made = 0, []
    for own in tensors:
        views = []
        for tensor in own:
            views.append(view_of(room, start, tensor))
            start += _round(tensor.nbytes)
        made.append(views)
    return made


def _round(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
