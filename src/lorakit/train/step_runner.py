"""Compute the gradients of an optimizer step: one interface, three ways.

    MicroSteps            one micro-batch after the other through autograd
    GraphedMicroSteps     the same as captured CUDA graphs (`engine/cuda_graphs.py`)
    LayerwiseSchedule     layer by layer over all micro-batches (`engine/layerwise.py`)

`choose_step_runner` chooses at the start of a run, from the plan and the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.data.batching import Batch
from lorakit.engine.chunked_layer import ChunkSize
from lorakit.engine.cuda_graphs import GraphedMicroSteps
from lorakit.engine.layerwise import LayerwiseSchedule
from lorakit.engine.lora_linear import FlatGradients
from lorakit.engine.token_objective import TokenObjective
from lorakit.ops.backend import has_matrix_kernels
from lorakit.train.loss import AttachResult
from lorakit.types import Placement

# Adds a micro-batch's gradients, and returns its loss times the scale; an objective with metrics
# returns a vector that begins with the loss.
ForwardBackward = Callable[[Batch, Any], Tensor]


class StepRunner(Protocol):
    """A way to compute the gradients of an optimizer step."""

    @property
    def gradients(self) -> list[Tensor]:
        """Float32 buffers that hold each gradient once, to sum over the ranks."""

    @property
    def slow_reason(self) -> str | None:
        """The reason why this way is slower than planned, if it knows one."""

    def __call__(self, micro_batches: Iterable[Batch], scale: float) -> Tensor:
        """Leave the gradients in the parameters' .grad; return the sum of losses times `scale`.

        With an objective that has metrics, their sums follow the loss in a vector.
        """

    def reset(self) -> None:
        """Discard gradients and kept state of a step that ran out of memory."""

    def describe(self) -> str:
        """Name this way in a few words."""


class MicroSteps:
    """Micro-batches one after the other through autograd.

    Args:
        flat: one buffer of all gradients, to sum over ranks; None for a single rank.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        parameters: Sequence[nn.Parameter],
        place: Callable[[Batch], Batch],
        flat: FlatGradients | None = None,
    ) -> None:
        self.forward_backward, self.parameters, self.place = forward_backward, parameters, place
        self.flat = flat
        self.slow_reason = None

    @property
    def gradients(self) -> list[Tensor]:
        return [] if self.flat is None else [self.flat.flat]

    def __call__(self, micro_batches: Iterable[Batch], scale: float) -> Tensor:
        if self.flat is not None:
            self.flat.begin()
        total = torch.zeros((), device=self.parameters[0].device)
        for micro in micro_batches:
            total = total + self.forward_backward(self.place(micro), scale)
        return total

    def reset(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def describe(self) -> str:
        return "no CUDA graphs"


def choose_step_runner(
    forward_backward: ForwardBackward,
    attached: AttachResult,
    parameters: Sequence[nn.Parameter],
    placement: Placement,
    device: torch.device,
    loss_scaler: bool = False,
    ranks: int = 1,
    objective: TokenObjective | None = None,
) -> StepRunner:
    """Choose the way for a run.

    Args:
        parameters: all trained parameters.
        loss_scaler: float16 gradients are scaled; the scaler's factor changes between steps.
        objective: a loss of token losses, which the layer-by-layer schedule computes itself.
    """
    engine = attached.engine
    if engine is not None and placement.layerwise:
        chunk = ChunkSize(placement.tokens_at_once, placement.heads_at_once)
        on_gpu = placement.inputs_on_gpu
        return LayerwiseSchedule(engine, attached.head, parameters, chunk, on_gpu, objective)

    def place(micro: Batch) -> Batch:
        return attached.place(micro, device)

    groups = [] if engine is None else engine.groups
    # Graphs need fixed shapes: packed documents in float32 attend one by one. Streamed experts are
    # copied to one of two buffers, chosen on the host.
    if (
        not attached.own_layers
        and not placement.experts_on_host
        and attached.frozen_head
        and not loss_scaler
        and has_matrix_kernels(parameters[0])
        and attached.base.dtype != torch.float32
    ):
        compiled = attached.compiled is not None
        return GraphedMicroSteps(forward_backward, parameters, groups, place, compiled)
    flat = FlatGradients(parameters, groups) if ranks > 1 else None
    return MicroSteps(forward_backward, parameters, place, flat)
