"""Load a base once for several runs that are trained one after the other.

Each run gets a copy of the modules that shares the frozen weights, so adapters, hooks and patched
forwards of a run end with its copy. Some runs change the weights: trained biases, PiSSA, parts in
host memory. Before the next run the weights are compared with their checksums, and a changed base
is loaded again.
"""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.model.load import load_base
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

# Integers of the same width, in which every bit of a weight counts.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedBase:
    """The base model of several runs; `loads` counts how often its files were read."""

    def __init__(self) -> None:
        self.loads = 0
        self._base: Any = None
        self._key: tuple[Any, ...] = ()
        self._sums: dict[str, Any] = {}
        self._trained: list[bool] = []

    def take(self, recipe: Recipe, location: str, device: Device, on_host: bool) -> Any:
        """Return the base for one run, bit by bit as `load_base` does.

        Args:
            on_host: the run keeps its weights in host memory, and moves them.
        """
        key = (location, recipe.revision, recipe.method, device.kind, device.dtype, on_host)
        if self._base is not None and key == self._key and checksums(self._base) == self._sums:
            for parameter, trained in zip(self._base.parameters(), self._trained, strict=True):
                parameter.requires_grad_(trained)
            return copy_modules(self._base)
        self.release()
        self.loads += 1
        before = _random_states()
        base = load_base(recipe, location, device, on_host)
        # A class that draws numbers while it loads gives later runs another adapter otherwise.
        if on_host or _random_states() != before:
            return base
        self._base, self._key, self._sums = base, key, checksums(base)
        self._trained = [parameter.requires_grad for parameter in base.parameters()]
        return copy_modules(base)

    def release(self) -> None:
        """Free the base; the next run loads it."""
        self._base = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def copy_modules(base: Any) -> Any:
    """Copy a model's modules; parameters, and the scales of quantized ones, are shared."""
    shared: dict[int, Any] = {id(p): p for p in base.parameters()}
    for holder in [*base.modules(), *base.parameters()]:
        state = getattr(holder, "quant_state", None)
        if state is not None:
            shared[id(state)] = state
    return copy.deepcopy(base, shared)


def checksums(base: Any) -> dict[str, Any]:
    """Sum of the bits, type and device of each weight: different if one of its bits is."""
    sums: dict[str, Any] = {}
    for name, parameter in base.named_parameters():
        sums[name] = _checksum(parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            sums[f"{name}.absmax"] = _checksum(state.absmax)
    return sums


def _checksum(tensor: Tensor) -> tuple[int, str, str]:
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)), str(tensor.dtype), str(tensor.device)


def _random_states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [torch.get_rng_state(), *cuda]
    return random.getstate(), numpy[1].tobytes(), numpy[2], [s.numpy().tobytes() for s in states]
