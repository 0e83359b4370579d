"""Parameters enter; one flat float32 buffer leaves that holds all their gradients.

The engine's groups add their gradients there themselves, so that none goes through autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.model.lora_group import LoraGroup, in_flat_order, point_sinks


class FlatGradients:
    """The gradients of `parameters`, those of `groups` first; their .grad become views."""

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[LoraGroup]) -> None:
        ordered = in_flat_order(groups)
        known = {id(p) for p in ordered}
        self.parameters = ordered + [p for p in parameters if id(p) not in known]
        sizes = [p.numel() for p in self.parameters]
        device = self.parameters[0].device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.grads = [
            part.view_as(p) for part, p in zip(self.flat.split(sizes), self.parameters, strict=True)
        ]
        point_sinks(groups, self.flat)

    def begin(self) -> None:
        """Start an optimizer step: gradients to zero, each parameter with its own."""
        self.flat.zero_()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
