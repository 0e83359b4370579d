"""The fast layers' frozen weights enter, wherever they lie; they leave as views that move.

Weights live in page-locked host memory, one piece a layer, or in parts on the cards of all ranks.
`enter(n)` points the modules of layer n at their copy on the card (`Slots`); everyone else's point
home: at the host, so that what reads weights always finds the right ones, or at NaN, where no rank
has them all. NF4 weights travel packed, with their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.model.lora_group import LoraGroup
from lorakit.model.page_locked import PageLocked, view_of
from lorakit.model.shard import Shard, nowhere
from lorakit.model.slots import Slots
from lorakit.ranks import Ranks

_ALIGNED = 256


class StreamedBase:
    """The frozen weights of each layer's groups, elsewhere and by turns on the card.

    Args:
        spread: ranks that hold a part each; None: host memory holds them.
    """

    def __init__(
        self, layers: list[list[LoraGroup]], device: torch.device, spread: Ranks | None = None
    ) -> None:
        self.layers = layers
        self.rooms: list[PageLocked | Shard] = []
        self.home: list[list[list[Tensor]]] = []
        for groups in layers:
            tensors = [group.frozen() for group in groups]
            size = _round(sum(_round(t.nbytes) for own in tensors for t in own), spread)
            if spread is None:
                room: PageLocked | Shard = PageLocked(size, device)
                home = _filled(room.bytes, tensors)
            else:
                whole = torch.zeros(size, dtype=torch.uint8)
                _filled(whole, tensors)
                room = Shard(whole, spread, device)
                home = [[nowhere(tensor) for tensor in own] for own in tensors]
            for group, own in zip(groups, home, strict=True):
                group.point_to(own)
                group.constants_to_device()
            self.rooms.append(room)
            self.home.append(home)
        self.slots = Slots(self.rooms, device)

    def enter(self, number: int, following: int | None = None) -> None:
        """Layer `number` is on the card for the work queued from here on, `following` under way."""
        place, displaced = self.slots.acquire(number)
        self._send_home(displaced)
        views = _views(place, self.home[number])
        for group, own in zip(self.layers[number], views, strict=True):
            group.point_to(own)
        if following is not None:
            self._send_home(self.slots.prefetch(following))

    def rest(self) -> None:
        """Point every module home."""
        for number in range(len(self.layers)):
            self._send_home(number)

    def _send_home(self, number: int | None) -> None:
        if number is not None:
            for group, own in zip(self.layers[number], self.home[number], strict=True):
                group.point_to(own)


def _filled(room: Tensor, tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copies of `tensors` in `room`."""
    views = _views(room, tensors)
    for theirs, ours in zip(tensors, views, strict=True):
        for source, target in zip(theirs, ours, strict=True):
            target.copy_(source)
    return views


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


def _round(size: int, spread: Ranks | None = None) -> int:
    step = _ALIGNED * (spread.per_node if spread else 1)
    return -(-size // step) * step
