"""Bytes that all ranks of a machine hold enter; each keeps a part of them on its device.

`fill` gathers the whole from the parts over the links between the cards, on the stream it is called
on. It is what FSDP's full shard does to frozen weights (ZeRO stage 3, arXiv 1910.02054), on raw
bytes: packed NF4 weights and their scales travel like any others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ranks import Ranks


class Shard:
    """This rank's part of `whole`, whose length is a multiple of the ranks of a machine."""

    def __init__(self, whole: Tensor, ranks: Ranks, device: torch.device) -> None:
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


def nowhere(like: Tensor) -> Tensor:
    """A tensor of this shape and type that holds one number for all: NaN, or 0 of whole numbers.

    It stands where a weight was that no rank holds alone: what reads it by mistake gets NaN.
    """
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((1,), value, dtype=like.dtype).expand(like.shape)
