"""Evaluation mode as a context manager, and the device on which a model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """Device of the model's inputs and logits; embedding and layers may be in host memory."""
    device: torch.device = model.get_output_embeddings().weight.device
    return device


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore the previous mode on exit."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
