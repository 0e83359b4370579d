"""Run an optimizer step layer by layer over all its micro-batches.

    up:    for each layer, for each micro-batch: x -> out; x is kept (`LayerInputs`)
    top:   for each micro-batch: norm, head, loss, and the gradient of the last hidden states
    down:  for each layer, for each micro-batch: x, d -> d; the layer's gradients are then complete

Gradients are the same sums as in any other order. A layer's frozen weights are needed twice per
step, so they may come from host memory (`StreamedBase`), NF4 weights are dequantized twice per
step, and the adapters may be on the host with their optimizer (`HostAdapters`). The order is that
of L2L (arXiv 2002.05645).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.batching import Batch
from lorakit.engine.activation_offload import LayerInputs
from lorakit.engine.attach import Engine
from lorakit.engine.attention import Segments
from lorakit.engine.chunked_layer import ChunkSize, LayerTask, backward, forward
from lorakit.engine.decoder_layer import ForwardContext, Weights
from lorakit.engine.lora_linear import FlatGradients, point_sinks, refresh
from lorakit.engine.token_objective import TokenObjective
from lorakit.ops.cross_entropy import summed_cross_entropy, token_cross_entropy


@dataclass(slots=True)
class _Micro:
    """State of one micro-batch: hidden states, or their gradient, [M, D]."""

    call: ForwardContext
    batch: int
    hidden: Tensor
    micro: Batch


class LayerwiseSchedule:
    """Layer-by-layer schedule of optimizer steps.

    Args:
        engine: its groups' gradient buffers are reassigned.
        head: hidden states [n, D] to logits, see `token_cross_entropy`.
        parameters: all trained parameters.
        cut: tokens and heads that pass through a layer at once.
        on_gpu: layers whose inputs stay on the GPU.
        objective: loss of a micro-batch from the losses of its tokens; None for their sum.
    """

    def __init__(
        self,
        engine: Engine,
        head: Any,
        parameters: Sequence[nn.Parameter],
        cut: ChunkSize,
        on_gpu: int = 0,
        objective: TokenObjective | None = None,
    ) -> None:
        self.engine, self.head, self.cut, self.on_gpu = engine, head, cut, on_gpu
        self.objective = objective
        self.slow_reason = (
            "check whether the PCIe link or the GPU is shared with another program (nvidia-smi)"
        )
        self.flat = None
        if engine.host_adapters is None:
            self.flat = FlatGradients(parameters, engine.groups)
        self.reset()

    def reset(self) -> None:
        """Discard the kept inputs of all layers."""
        self.inputs = LayerInputs(len(self.engine.layers), self.on_gpu, self.engine.device)

    @property
    def gradients(self) -> list[Tensor]:
        """The buffers of all gradients: one, or one a layer if the adapters are on the host."""
        adapters = self.engine.host_adapters
        if adapters is not None:
            return [buffer.bytes.view(torch.float32) for buffer in adapters.grads]
        return [] if self.flat is None else [self.flat.flat]

    def describe(self) -> str:
        """Name the schedule."""
        return "layer by layer"

    def __call__(self, micro_batches: Iterable[Batch], scale: float) -> Tensor:
        """Compute one step; gradients are in the parameters' .grad.

        Args:
            micro_batches: each is copied to the engine's device, and released after its embedding.

        Returns:
            Sum of the micro-batches' losses times `scale`; with an objective followed by the sums
            of its metrics.
        """
        if self.engine.host_adapters is not None:
            self.engine.host_adapters.adopt()
        if self.flat is not None:
            self.flat.begin()
            refresh(self.engine.groups, training=True)
        with torch.no_grad(), torch.autocast(self.engine.device.type, enabled=False):
            states = [self._start(self.engine.to_device(micro)) for micro in micro_batches]
            self._forward_layers(states)
            loss = torch.zeros((), device=self.engine.device)
            for state in states:
                loss = loss + self._loss(state, scale)
            self._backward_layers(states)
        if self.engine.host_adapters is not None:
            self.engine.host_adapters.finish()
        return loss

    def _start(self, micro: Batch) -> _Micro:
        segments = Segments.of(micro.get("borders"), micro.get("lengths", ()))
        hidden, call = self.engine.embed_and_context(micro, segments)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _Micro(call, hidden.shape[0], rows, micro)

    def _forward_layers(self, states: list[_Micro]) -> None:
        count = len(self.engine.layers)
        for index, layer in enumerate(self.engine.layers):
            self.engine.load_layer(index, True, index + 1 if index + 1 < count else None)
            weights = Weights(layer)
            for micro_index, state in enumerate(states):
                work = LayerTask(layer, state.call, state.batch, weights, self.cut)
                out = forward(work, state.hidden)
                self.inputs.put((index, micro_index), state.hidden)
                state.hidden = out
        self.inputs.settle()

    def _backward_layers(self, states: list[_Micro]) -> None:
        layers = self.engine.layers
        order = [
            (n, micro_index)
            for n in reversed(range(len(layers)))
            for micro_index in range(len(states))
        ]
        adapters = self.engine.host_adapters
        for index in reversed(range(len(layers))):
            layer = layers[index]
            self.engine.load_layer(index, True, index - 1 if index else None)
            if adapters is not None:
                point_sinks(layer.groups, adapters.gradients(index))
            weights = Weights(layer)
            for micro_index, state in enumerate(states):
                x = self.inputs.take((index, micro_index))
                order.pop(0)
                self.inputs.fetch(order)
                work = LayerTask(layer, state.call, state.batch, weights, self.cut)
                backward(work, x, state.hidden, wants_dx=index > 0)
                del x
            if adapters is not None:
                adapters.copy_grads_to_host(index)

    def _loss(self, state: _Micro, scale: float) -> Tensor:
        """The loss times `scale`; the hidden states are overwritten by their gradient."""
        hidden, total = state.hidden, torch.zeros((), device=state.hidden.device)
        positions, targets = state.micro["positions"], state.micro["targets"]
        untrained = torch.ones(hidden.shape[0], 1, dtype=torch.bool, device=hidden.device)
        untrained[positions] = False
        losses = []
        for chosen, target in zip(
            positions.split(self.cut.tokens), targets.split(self.cut.tokens), strict=True
        ):
            with torch.enable_grad():
                rows = hidden[chosen].requires_grad_()
                normal = self.engine.decoder.norm(rows)
                if self.objective is None:
                    loss = summed_cross_entropy(normal, target, self.head) * scale
                else:
                    losses.append(token_cross_entropy(normal, target, self.head))
                    loss = losses[-1].sum()
                (grad,) = torch.autograd.grad(loss, rows)
            # Each position predicts one token: its hidden state is not needed any longer.
            hidden[chosen] = grad
            total += loss.detach()
        hidden.masked_fill_(untrained, 0)
        if self.objective is None:
            return total
        # A token's loss depends on its own hidden state only: its gradient is multiplied by the
        # derivative of the objective.
        with torch.enable_grad():
            each = torch.cat(losses).detach().requires_grad_()
            loss, sums = self.objective(each, state.micro)
            (weights,) = torch.autograd.grad(loss * scale, each)
        hidden[positions] = (hidden[positions] * weights.unsqueeze(1)).to(hidden.dtype)
        return torch.cat([(loss.detach() * scale).view(1), sums])
