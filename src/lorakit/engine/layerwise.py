"""The micro-batches of one optimizer step enter; their loss leaves, worked layer by layer.

    up:    for each layer, for each micro-batch: x -> out; x is kept (`LayerInputs`)
    top:   for each micro-batch: norm, head, loss, and the gradient of the last hidden states
    down:  for each layer, for each micro-batch: x, d -> d; the layer's gradients are then whole

Gradients are the sums they are in any other order. A layer's frozen weights are needed twice a
step, so they may come from host memory (`StreamedBase`), NF4 ones are dequantized twice a step,
and the adapters may live on the host with their optimizer (`HostAdapters`). The order is that of
L2L (arXiv 2002.05645).
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
from lorakit.ops.cross_entropy import summed_cross_entropy


@dataclass(slots=True)
class _Micro:
    """One micro-batch on its way: hidden states, or their gradient, [M, D]."""

    call: ForwardContext
    batch: int
    hidden: Tensor
    targets: Tensor
    positions: Tensor


class LayerMajor:
    """Runs optimizer steps layer by layer.

    Args:
        engine: its groups' sinks are taken over.
        head: hidden states [n, D] to logits, see `summed_cross_entropy`.
        parameters: all that train.
        on_card: layers whose inputs stay on the card.
    """

    def __init__(
        self,
        engine: Engine,
        head: Any,
        parameters: Sequence[nn.Parameter],
        cut: ChunkSize,
        on_card: int = 0,
    ) -> None:
        self.engine, self.head, self.cut = engine, head, cut
        self.inputs = LayerInputs(len(engine.layers), on_card, engine.device)
        self.gradients = None
        if engine.host_adapters is None:
            self.gradients = FlatGradients(parameters, engine.groups)

    def __call__(self, micros: Iterable[Batch], scale: float) -> Tensor:
        """Sum of the micro-batches' losses times `scale`; gradients are in the parameters' .grad.

        Args:
            micros: on the engine's device, ids of an embedding on the host as `inputs_embeds`;
                each is let go once its hidden states are there.
        """
        if self.engine.host_adapters is not None:
            self.engine.host_adapters.adopt()
        if self.gradients is not None:
            self.gradients.begin()
            refresh(self.engine.groups, training=True)
        with torch.no_grad(), torch.autocast(self.engine.device.type, enabled=False):
            states = [self._start(micro) for micro in micros]
            self._up(states)
            loss = torch.zeros((), device=self.engine.device)
            for state in states:
                loss += self._top(state, scale)
            self._down(states)
        if self.engine.host_adapters is not None:
            self.engine.host_adapters.finish()
        return loss

    def _start(self, micro: Batch) -> _Micro:
        segments = Segments.of(micro.get("borders"), micro.get("lengths", ()))
        hidden, call = self.engine.begin(micro, segments)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _Micro(call, hidden.shape[0], rows, micro["targets"], micro["positions"])

    def _up(self, states: list[_Micro]) -> None:
        count = len(self.engine.layers)
        for number, layer in enumerate(self.engine.layers):
            self.engine.enter(number, True, number + 1 if number + 1 < count else None)
            weights = Weights(layer)
            for at, state in enumerate(states):
                work = LayerTask(layer, state.call, state.batch, weights, self.cut)
                out = forward(work, state.hidden)
                self.inputs.put((number, at), state.hidden)
                state.hidden = out
        self.inputs.settle()

    def _down(self, states: list[_Micro]) -> None:
        layers = self.engine.layers
        order = [(n, at) for n in reversed(range(len(layers))) for at in range(len(states))]
        adapters = self.engine.host_adapters
        for number in reversed(range(len(layers))):
            layer = layers[number]
            self.engine.enter(number, True, number - 1 if number else None)
            if adapters is not None:
                point_sinks(layer.groups, adapters.gradients(number))
            weights = Weights(layer)
            for at, state in enumerate(states):
                x = self.inputs.take((number, at))
                order.pop(0)
                self.inputs.fetch(order)
                work = LayerTask(layer, state.call, state.batch, weights, self.cut)
                backward(work, x, state.hidden, wants_dx=number > 0)
                del x
            if adapters is not None:
                adapters.collect(number)

    def _top(self, state: _Micro, scale: float) -> Tensor:
        """The loss times `scale`; the hidden states become their gradient, in place."""
        hidden, total = state.hidden, torch.zeros((), device=state.hidden.device)
        untrained = torch.ones(hidden.shape[0], 1, dtype=torch.bool, device=hidden.device)
        for places, targets in zip(
            state.positions.split(self.cut.tokens),
            state.targets.split(self.cut.tokens),
            strict=True,
        ):
            with torch.enable_grad():
                rows = hidden[places].requires_grad_()
                normal = self.engine.decoder.norm(rows)
                loss = summed_cross_entropy(normal, targets, self.head) * scale
                (found,) = torch.autograd.grad(loss, rows)
            # Each place predicts one token: its hidden state is needed no more.
            hidden[places] = found
            untrained[places] = False
            total += loss.detach()
        hidden.masked_fill_(untrained, 0)
        return total
