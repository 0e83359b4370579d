"""Stream the frozen weights of fused layers from host memory, or gather them from all ranks.

Weights are kept in pinned host memory, one buffer a layer, or sharded over the GPUs of all ranks.
`enter(n)` points the modules of layer n at their copy on the GPU (`DoubleBuffer`); the modules of
all other layers point to the host copy, which any reader may use, or to NaN where no rank has all
weights. NF4 weights are copied packed, with their scales.

Bytes that all ranks of a machine hold enter; each keeps a part of them on its device.

`fill` gathers the whole from the parts over the links between the cards, on the stream it is called
on. It is what FSDP's full shard does to frozen weights (ZeRO stage 3, arXiv 1910.02054), on raw
bytes: packed NF4 weights and their scales travel like any others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.distributed.process_group import DistributedContext
from lorakit.engine.host_memory import DoubleBuffer, PageLocked, view_of
from lorakit.engine.lora_linear import FusedLoraLinear

_ALIGNED = 256


class StreamedBase:
    """The frozen weights of each layer's groups, elsewhere and by turns on the card.

    Args:
        spread: ranks that hold a part each; None: host memory holds them.
    """

    def __init__(
        self,
        layers: list[list[FusedLoraLinear]],
        device: torch.device,
        spread: DistributedContext | None = None,
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
                home = [[nan_placeholder(tensor) for tensor in own] for own in tensors]
            for group, own in zip(groups, home, strict=True):
                group.point_to(own)
                group.constants_to_device()
            self.rooms.append(room)
            self.home.append(home)
        self.slots = DoubleBuffer(self.rooms, device)

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


def _round(size: int, spread: DistributedContext | None = None) -> int:
    step = _ALIGNED * (spread.per_node if spread else 1)
    return -(-size // step) * step


class Shard:
    """This rank's part of `whole`, whose length is a multiple of the ranks of a machine."""

    def __init__(self, whole: Tensor, ranks: DistributedContext, device: torch.device) -> None:
        self.size = whole.numel()
        self.group = ranks.of_node
        part = self.size // ranks.per_node
        start = part * (ranks.number % ranks.per_node)
        self.bytes = torch.empty(part, dtype=torch.uint8, device=device)
        self.bytes.copy_(whole[start : start + part])

    def fill(self, place: Tensor) -> None:
        """Put the whole into `place`; every rank of the machine calls this, in the same order."""
        import torch.distributed as dist

        # torch 2.13 renames it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(place, self.bytes, group=self.group)


def nan_placeholder(like: Tensor) -> Tensor:
    """A tensor of this shape and type that holds one number for all: NaN, or 0 of whole numbers.

    It stands where a weight was that no rank holds alone: what reads it by mistake gets NaN.
    """
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((1,), value, dtype=like.dtype).expand(like.shape)
