"""Keep the adapters' float32 values and gradients in host memory.

The optimizer then runs on the host, with its state: a step over 160 million parameters takes 0.04 s
on 16 cores (benchmarks/results/time_link.json). The GPU holds values and gradients of two layers.
`load_layer(n)` copies layer n's values to the GPU; `gradients(n)` returns the buffer to which its
gradients are added, and `copy_grads_to_host(n)` copies them to the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.engine.host_memory import DoubleBuffer, PageLocked
from lorakit.engine.lora_linear import FusedLoraLinear, in_flat_order


class HostAdapters:
    """Values and gradients of every adapter in host memory, layer by layer."""

    def __init__(self, layers: list[list[FusedLoraLinear]], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.parameters = [in_flat_order(groups) for groups in layers]
        self.sizes = [[p.numel() for p in parameters] for parameters in self.parameters]
        self.values = [PageLocked(4 * sum(layer_sizes), device) for layer_sizes in self.sizes]
        self.grads = [PageLocked(4 * sum(layer_sizes), device) for layer_sizes in self.sizes]
        self.slots = DoubleBuffer(self.values, device)
        self.adopt()
        largest = max(sum(layer_sizes) for layer_sizes in self.sizes)
        self.grad_buffers = [torch.zeros(largest, device=device) for _ in range(2)]
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.sent: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self.turn = 0
        self._share_copies()

    def adopt(self) -> None:
        """Move values from elsewhere to host memory: at the start and after a checkpoint load."""
        for index, parameters in enumerate(self.parameters):
            views = self._views(index, self.values[index].bytes)
            for parameter, view in zip(parameters, views, strict=True):
                if parameter.data_ptr() != view.data_ptr():
                    view.copy_(parameter.data)
                    parameter.data = view
                    parameter.grad = None
                    self.slots.forget()

    def load_layer(self, number: int, following: int | None = None) -> None:
        """Make layer `number`'s values available on the GPU to work queued from here on."""
        buffer, displaced = self.slots.acquire(number)
        self._point_to_host(displaced)
        views = self._views(number, buffer)
        for parameter, view in zip(self.parameters[number], views, strict=True):
            parameter.data = view
        if following is not None:
            self._point_to_host(self.slots.prefetch(following))

    def gradients(self, number: int) -> Tensor:
        """Float32 zeros on the GPU for the gradients of layer `number`, in flat order."""
        self.turn = 1 - self.turn
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.sent[self.turn])
        return self.grad_buffers[self.turn][: sum(self.sizes[number])].zero_()

    def copy_grads_to_host(self, number: int) -> None:
        """Copy the buffer that `gradients` returned for layer `number` to the host."""
        source = self.grad_buffers[self.turn][: sum(self.sizes[number])]
        target = self.grads[number].bytes.view(torch.float32)
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.sent[self.turn].record(self.stream)

    def finish(self) -> None:
        """Wait for the gradients, and assign them to the parameters; all are on the host then."""
        if self.stream is not None:
            self.stream.synchronize()
        self.point_to_host()
        for index, parameters in enumerate(self.parameters):
            views = self._views(index, self.grads[index].bytes)
            for parameter, grad in zip(parameters, views, strict=True):
                parameter.grad = grad

    def point_to_host(self) -> None:
        """Point every parameter at its values in host memory; copies on the GPU become invalid."""
        for index in range(len(self.layers)):
            self._point_to_host(index)
        self.slots.forget()

    def leave(self) -> None:
        """Move the adapters back to the GPU, as savers and generation expect them."""
        for parameters in self.parameters:
            for parameter in parameters:
                parameter.data = parameter.data.to(self.device)
                parameter.grad = None

    def _point_to_host(self, index: int | None) -> None:
        if index is not None:
            views = self._views(index, self.values[index].bytes)
            for parameter, view in zip(self.parameters[index], views, strict=True):
                parameter.data = view

    def _views(self, index: int, buffer: Tensor) -> list[Tensor]:
        """Views of a layer's bytes, one for each of its parameters."""
        flat = buffer.view(torch.float32).split(self.sizes[index])
        return [t.view(p.shape) for t, p in zip(flat, self.parameters[index], strict=True)]

    def _share_copies(self) -> None:
        """Share one copy of the factors in the base's dtype: only one layer works at a time."""
        shared: dict[tuple[str, torch.Size, torch.Size], tuple[Tensor, Tensor]] = {}
        for groups in self.layers:
            for group in groups:
                key = (group.name, group.a.shape, group.b.shape)
                group.a, group.b = shared.setdefault(key, (group.a, group.b))
