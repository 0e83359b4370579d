"""A micro-batch enters; its loss leaves and its gradients are added: replayed as one CUDA graph.

Launching a layer's 75 kernels from Python took 6.8 ms on an H100 machine, running them 3.5 ms: at
2,048 tokens the card waits for its host. A captured graph is launched at once. Graphs need fixed
shapes and addresses, so micro-batches are padded to a few sizes, gradients live in one flat buffer,
and all graphs share one memory pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.batching import Batch
from lorakit.engine.lora_linear import FlatGradients, FusedLoraLinear
from lorakit.types import IGNORE

# A micro-batch is padded by half of this on average: 64 of 2,048 tokens are 3%.
TOKENS_STEP = 128
MAX_GRAPHS = 48
WARM_UP_TOKENS = 128

ForwardBackward = Callable[[Batch, Tensor], Tensor]


@dataclass(slots=True)
class _Captured:
    graph: Any
    inputs: Batch
    loss: Tensor


class GraphedMicroSteps:
    """Runs `forward_backward(batch, scale)` as CUDA graphs, one for each shape.

    Args:
        forward_backward: adds gradients to the parameters' .grad and returns the loss; must not
            synchronize with the host.
        parameters: all that train; their .grad become views of one buffer.
        groups: the engine's groups, which add their gradients there themselves.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        parameters: Sequence[nn.Parameter],
        groups: Sequence[FusedLoraLinear] = (),
    ) -> None:
        self.forward_backward = forward_backward
        self.gradients = FlatGradients(parameters, groups)
        self.scale = torch.zeros((), device=self.gradients.flat.device)
        self.graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self.pool: Any = None
        self.warm: set[bool] = set()
        self.failed: str | None = None

    def begin(self, scale: float) -> None:
        """Start an optimizer step: gradients to zero, and the factor of its losses."""
        self.gradients.begin()
        self.scale.fill_(scale)

    def __call__(self, micro: Batch) -> Tensor:
        """Loss of the micro-batch (see `to_bucket`), times the step's factor; adds gradients."""
        self._warm_up(micro)
        if self.failed:
            return self.forward_backward(micro, self.scale)
        key = shape_key(micro)
        found = self.graphs.pop(key, None)
        if found is None:
            found = self._capture(micro)
            if found is None:
                return self.forward_backward(micro, self.scale)
        self.graphs[key] = found
        for name, value in found.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(micro[name])
        found.graph.replay()
        return found.loss

    def _warm_up(self, micro: Batch) -> None:
        """Compile kernels and make library handles on a few tokens: a capture cannot do that.

        The random generator is put back, so a resumed run, which warms up too, draws equal masks.
        """
        packed = "borders" in micro
        if packed in self.warm:
            return
        self.warm.add(packed)
        before, generator = self.gradients.flat.clone(), torch.cuda.get_rng_state()
        self.forward_backward(first_tokens(micro, WARM_UP_TOKENS), self.scale)
        self.gradients.flat.copy_(before)
        torch.cuda.set_rng_state(generator)

    def _capture(self, micro: Batch) -> _Captured | None:
        while len(self.graphs) >= MAX_GRAPHS:
            self.graphs.popitem(last=False)
        # What eager runs left cached would stand beside the graphs' own pool.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in micro.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="relaxed"):
                loss = self.forward_backward(inputs, self.scale)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.failed = str(error).splitlines()[0]
            return None
        self.pool = self.pool or graph.pool()
        return _Captured(graph, inputs, loss)


def first_tokens(micro: Batch, count: int) -> Batch:
    """The first tokens of the first row, as one document; the loss is on the first half of them."""
    made = dict(micro)
    for name in ("input_ids", "position_ids", "inputs_embeds"):
        if name in made:
            made[name] = made[name][:1, :count]
    length = made["inputs_embeds" if "inputs_embeds" in made else "input_ids"].shape[1]
    if "borders" in made:
        made["borders"] = made["borders"].clamp(max=length)
        made["borders"][1:] = length
    half = min(length // 2, len(made["targets"]))
    made["targets"] = made["targets"][:half]
    made["positions"] = torch.arange(half, device=made["targets"].device)
    return made


def shape_key(micro: Batch) -> tuple[Any, ...]:
    """What a graph depends on: shapes, and the longest document's bucket."""
    shapes = ((k, tuple(v.shape)) for k, v in sorted(micro.items()) if isinstance(v, Tensor))
    return (*shapes, micro.get("longest"))


def to_bucket(micro: Batch) -> Batch:
    """The micro-batch padded to one of a few shapes; added tokens carry no target.

    A packed row gets one more document of padding; rows of one length are left as they are. Of
    supervised tokens there are eight sizes for each number of tokens.
    """
    made = {k: v for k, v in micro.items() if k not in ("lengths", "attention_mask")}
    tokens = micro["input_ids"].numel()
    if "borders" in micro:
        size = _round_up(tokens, TOKENS_STEP)
        pad = size - tokens
        made["input_ids"] = nn.functional.pad(micro["input_ids"], (0, pad))
        made["position_ids"] = nn.functional.pad(micro["position_ids"], (0, pad))
        count = _round_up(len(micro["borders"]) + 1, 16)
        borders = nn.functional.pad(
            micro["borders"], (0, count - len(micro["borders"])), value=size
        )
        made["borders"] = borders
        made["longest"] = min(_round_up(max(*micro["lengths"], pad), 512), size)
        tokens = size
    wanted = _round_up(micro["targets"].numel(), max(1, tokens // 8))
    extra = wanted - micro["targets"].numel()
    made["positions"] = nn.functional.pad(micro["positions"], (0, extra))
    made["targets"] = nn.functional.pad(micro["targets"], (0, extra), value=IGNORE)
    return made


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
