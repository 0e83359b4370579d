"""Stream the frozen experts of a mixture from pinned host memory, one layer at a time.

All else stays on the GPU. Before a layer's experts run, their weights (packed NF4 with scales, or
16 bits) are copied into one of two buffers, and those of the next layer follow while they work
(`engine/weight_streaming.py`). Activations are recomputed layer by layer, so the second forward of
a layer, right before its backward, makes its weights resident again: two copies a micro-batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lorakit.engine.weight_streaming import StreamedBase
from lorakit.model.grouped_experts import GroupedExperts, expert_modules, group_experts


class StreamedExperts:
    """The experts of one model in host memory; each call of a layer's brings them to `device`."""

    def __init__(self, base: Any, device: torch.device) -> None:
        group_experts(base, next(p.dtype for p in base.parameters() if p.is_floating_point()))
        self.experts = [m for _, m in expert_modules(base) if isinstance(m, GroupedExperts)]
        for module in base.modules():
            if not isinstance(module, GroupedExperts):
                module._apply(lambda tensor: tensor.to(device), recurse=False)
        for module in self.experts:
            module.compute_device = device
            for name, parameter in module.named_parameters(recurse=False):
                if name not in module.expert_shapes:  # biases
                    parameter.data = parameter.data.to(device)
        self.streamed = StreamedBase([[module] for module in self.experts], device)
        self.last = -1
        for number, module in enumerate(self.experts):
            module.fetch = functools.partial(self._fetch, number)

    def _fetch(self, number: int) -> None:
        """Make the experts of this layer available, and prefetch those that will be next."""
        # Recomputation runs from the last layer to the first, and begins with the last one.
        backward = number < self.last or (number == self.last and number > 0)
        following = number - 1 if backward else number + 1
        self.last = number
        inside = 0 <= following < len(self.experts)
        self.streamed.load_layer(number, following if inside else None)
