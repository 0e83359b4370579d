"""Stream frozen weights of layers or experts from host memory, or gather them from all ranks.

Weights are kept in pinned host memory, one buffer a layer, or sharded over the GPUs of a machine.
`load_layer(n)` points the modules of layer n at their copy on the GPU (`DoubleBuffer`); the modules
of all other layers point to the host copy, which any reader may use, or to NaN if no rank has all
weights. NF4 weights are copied packed, with their scales.

`Shard.fill` gathers a layer from all ranks of a machine over the links between GPUs, on the current
stream. This is what FSDP's full shard does to frozen weights (ZeRO stage 3, arXiv 1910.02054), on
raw bytes: packed NF4 weights and their scales are sent like any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorakit.distributed.process_group import DistributedContext
from lorakit.engine.host_memory import DoubleBuffer, PageLocked, view_of

_ALIGNED = 256


class FrozenGroup(Protocol):
    """Frozen weights that are used together: fused linear layers, or the experts of a layer."""

    def base_tensors(self) -> list[Tensor]:
        """The tensors to stream."""

    def set_base_storage(self, tensors: Sequence[Tensor]) -> None:
        """Use `tensors`, in the order of `base_tensors`."""

    def constants_to_device(self) -> None:
        """Copy what is not streamed to the compute device."""


class StreamedBase:
    """Frozen weights of each layer's groups, offloaded or sharded, and copied to the GPU in turn.

    Args:
        spread: ranks that hold one shard each; None: host memory holds the weights.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[FrozenGroup]],
        device: torch.device,
        spread: DistributedContext | None = None,
    ) -> None:
        self.layers = layers
        self.host_buffers: list[PageLocked | Shard] = []
        self.host_views: list[list[list[Tensor]]] = []
        for groups in layers:
            tensors = [group.base_tensors() for group in groups]
            size = _round(sum(_round(t.nbytes) for group in tensors for t in group), spread)
            if spread is None:
                buffer: PageLocked | Shard = PageLocked(size, device)
                views = _filled(buffer.bytes, tensors)
            else:
                complete = torch.zeros(size, dtype=torch.uint8)
                _filled(complete, tensors)
                buffer = Shard(complete, spread, device)
                views = [[nan_placeholder(t) for t in group_tensors] for group_tensors in tensors]
            for group, group_views in zip(groups, views, strict=True):
                group.set_base_storage(group_views)
                group.constants_to_device()
            self.host_buffers.append(buffer)
            self.host_views.append(views)
        self.slots = DoubleBuffer(self.host_buffers, device)

    def load_layer(self, number: int, following: int | None = None) -> None:
        """Make layer `number` available on the GPU to work queued from here on."""
        buffer, displaced = self.slots.acquire(number)
        self._point_to_host(displaced)
        views = _views(buffer, self.host_views[number])
        for group, group_views in zip(self.layers[number], views, strict=True):
            group.set_base_storage(group_views)
        if following is not None:
            self._point_to_host(self.slots.prefetch(following))

    def offload(self) -> None:
        """Point every module at its host copy."""
        for index in range(len(self.layers)):
            self._point_to_host(index)

    def _point_to_host(self, index: int | None) -> None:
        if index is not None:
            for group, group_views in zip(self.layers[index], self.host_views[index], strict=True):
                group.set_base_storage(group_views)


def _filled(buffer: Tensor, tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copy `tensors` into `buffer`; return the copies."""
    views = _views(buffer, tensors)
    for sources, targets in zip(tensors, views, strict=True):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
    return views


def _views(buffer: Tensor, tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Consecutive views into `buffer` with the shapes and dtypes of `tensors`."""
    start, all_views = 0, []
    for group_tensors in tensors:
        views = []
        for tensor in group_tensors:
            views.append(view_of(buffer, start, tensor))
            start += _round(tensor.nbytes)
        all_views.append(views)
    return all_views


def _round(size: int, spread: DistributedContext | None = None) -> int:
    step = _ALIGNED * (spread.local_world_size if spread else 1)
    return -(-size // step) * step


class Shard:
    """This rank's part of `whole`, whose length is divisible by the ranks of a machine."""

    def __init__(self, whole: Tensor, ranks: DistributedContext, device: torch.device) -> None:
        self.size = whole.numel()
        self.group = ranks.node_group
        size = self.size // ranks.local_world_size
        start = size * (ranks.rank % ranks.local_world_size)
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.bytes.copy_(whole[start : start + size])

    def fill(self, place: Tensor) -> None:
        """Gather all shards into `place`; all ranks of the machine call this in the same order."""
        import torch.distributed as dist

        # torch 2.13 renames this function.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(place, self.bytes, group=self.group)


def nan_placeholder(like: Tensor) -> Tensor:
    """A tensor of this shape and dtype whose elements share one value: NaN, or 0 for integers.

    It replaces a weight that no rank holds alone, so that erroneous reads return NaN.
    """
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((1,), value, dtype=like.dtype).expand(like.shape)
