"""Adapters enter; they leave with their float32 values and gradients in host memory.

The optimizer then works on the host, where its state lies too: a step over 160 million parameters
takes 0.04 s on 16 cores (benchmarks/results/time_link.json). Of the card they need one layer's
values and gradients, twice. `enter(n)` brings layer n's values; `gradients(n)` says where its
gradients are to be added, `collect(n)` sends them home.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.engine.host_memory import DoubleBuffer, PageLocked
from lorakit.engine.lora_linear import FusedLoraLinear, in_flat_order


class HostAdapters:
    """Values, gradients and optimizer state of every adapter in host memory, layer by layer."""

    def __init__(self, layers: list[list[FusedLoraLinear]], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.parameters = [in_flat_order(groups) for groups in layers]
        self.sizes = [[p.numel() for p in own] for own in self.parameters]
        self.values = [PageLocked(4 * sum(own), device) for own in self.sizes]
        self.grads = [PageLocked(4 * sum(own), device) for own in self.sizes]
        self.slots = DoubleBuffer(self.values, device)
        self.adopt()
        largest = max(sum(own) for own in self.sizes)
        self.sinks = [torch.zeros(largest, device=device) for _ in range(2)]
        on_card = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_card else None
        self.sent: list[Any] = [torch.cuda.Event() if on_card else None for _ in range(2)]
        self.turn = 0
        self._share_copies()

    def adopt(self) -> None:
        """Take in values that lie elsewhere: at the start, and where a checkpoint was loaded."""
        for number, own in enumerate(self.parameters):
            parts = self._parts(number, self.values[number].bytes)
            for parameter, place in zip(own, parts, strict=True):
                if parameter.data_ptr() != place.data_ptr():
                    place.copy_(parameter.data)
                    parameter.data = place
                    parameter.grad = None
                    self.slots.forget()

    def enter(self, number: int, following: int | None = None) -> None:
        """Layer `number`'s values are on the card for the work queued from here on."""
        place, displaced = self.slots.acquire(number)
        self._send_home(displaced)
        for parameter, own in zip(self.parameters[number], self._parts(number, place), strict=True):
            parameter.data = own
        if following is not None:
            self._send_home(self.slots.prefetch(following))

    def gradients(self, number: int) -> Tensor:
        """Float32 zeros on the card for the gradients of layer `number`, in flat order."""
        self.turn = 1 - self.turn
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.sent[self.turn])
        return self.sinks[self.turn][: sum(self.sizes[number])].zero_()

    def collect(self, number: int) -> None:
        """Send what `gradients` gave out for layer `number` to the host."""
        found = self.sinks[self.turn][: sum(self.sizes[number])]
        target = self.grads[number].bytes.view(torch.float32)
        if self.stream is None:
            target.copy_(found)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(found, non_blocking=True)
            self.sent[self.turn].record(self.stream)

    def finish(self) -> None:
        """Wait for the gradients, and give each parameter its own; all are on the host again."""
        if self.stream is not None:
            self.stream.synchronize()
        self.rest()
        for number, own in enumerate(self.parameters):
            for parameter, grad in zip(
                own, self._parts(number, self.grads[number].bytes), strict=True
            ):
                parameter.grad = grad

    def rest(self) -> None:
        """Point every parameter at its values in host memory; the card's copies count no more."""
        for number in range(len(self.layers)):
            self._send_home(number)
        self.slots.forget()

    def leave(self) -> None:
        """Put the adapters back on the card, as savers and generation expect them."""
        for own in self.parameters:
            for parameter in own:
                parameter.data = parameter.data.to(self.device)
                parameter.grad = None

    def _send_home(self, number: int | None) -> None:
        if number is not None:
            places = self._parts(number, self.values[number].bytes)
            for parameter, own in zip(self.parameters[number], places, strict=True):
                parameter.data = own

    def _parts(self, number: int, room: Tensor) -> list[Tensor]:
        """Views of a layer's bytes, one for each of its parameters."""
        parts = room.view(torch.float32).split(self.sizes[number])
        return [t.view(p.shape) for t, p in zip(parts, self.parameters[number], strict=True)]

    def _share_copies(self) -> None:
        """One copy of the factors in the base's type for all layers: one is at work at a time."""
        shared: dict[tuple[str, torch.Size, torch.Size], tuple[Tensor, Tensor]] = {}
        for groups in self.layers:
            for group in groups:
                key = (group.name, group.a.shape, group.b.shape)
                group.a, group.b = shared.setdefault(key, (group.a, group.b))
