"""A model enters in any mode; inside the `with` it is in evaluation mode and keeps no gradients.

Also says on which device a model works, which is not where all of its weights must lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """Where inputs go and logits come out; embedding and layers may lie in host memory."""
    device: torch.device = model.get_output_embeddings().weight.device
    return device


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
