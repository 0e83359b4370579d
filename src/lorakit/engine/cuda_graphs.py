"""Run micro-batches as CUDA graphs that add gradients and return the loss.

Launching a layer's 75 kernels from Python took 6.8 ms on an H100 machine, running them 3.5 ms: at
2,048 tokens the GPU waits for its host. A captured graph is launched at once. Graphs need fixed
shapes and addresses, so micro-batches are padded to a few sizes, gradients are in one flat buffer,
and all graphs share one memory pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
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
    """Run `forward_backward(batch, scale)` as CUDA graphs, one per shape.

    Args:
        forward_backward: adds gradients to the parameters' .grad and returns the loss; must not
            synchronize with the host.
        parameters: all trained parameters; their .grad become views of one buffer.
        groups: the engine's groups, which add their gradients to that buffer directly.
        place: copies a padded micro-batch to the GPU.
        compiled: the layers may be compiled at each new shape, which a capture cannot do.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        parameters: Sequence[nn.Parameter],
        groups: Sequence[FusedLoraLinear],
        place: Callable[[Batch], Batch],
        compiled: bool = False,
    ) -> None:
        self.forward_backward, self.place = forward_backward, place
        self.compiled = compiled
        self.flat = FlatGradients(parameters, groups)
        self.scale = torch.zeros((), device=self.flat.flat.device)
        self.reset()

    def reset(self) -> None:
        """Discard the captured graphs and their memory."""
        self.graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self.pool: Any = None
        self.warm: set[Any] = set()
        self.failed: str | None = None

    @property
    def gradients(self) -> list[Tensor]:
        """The buffer of all gradients."""
        return [self.flat.flat]

    @property
    def slow_reason(self) -> str | None:
        """The reason why micro-batches run without graphs."""
        return self.describe() if self.failed else None

    def describe(self) -> str:
        """Count the graphs, or give the reason why there are none."""
        return (
            f"no CUDA graphs: {self.failed}" if self.failed else f"{len(self.graphs)} CUDA graphs"
        )

    def __call__(self, micro_batches: Iterable[Batch], scale: float) -> Tensor:
        """Compute one optimizer step; return the sum of its losses times `scale`."""
        self.flat.begin()
        self.scale.fill_(scale)
        total = torch.zeros((), device=self.scale.device)
        for micro in micro_batches:
            total = total + self.add(self.place(to_bucket(micro)))
        return total

    def add(self, micro: Batch) -> Tensor:
        """Add gradients of a micro-batch (see `to_bucket`); return its loss times the factor."""
        self._warm_up(micro)
        if self.failed:
            return self.forward_backward(micro, self.scale)
        key = shape_key(micro)
        captured = self.graphs.pop(key, None)
        if captured is None:
            captured = self._capture(micro)
            if captured is None:
                return self.forward_backward(micro, self.scale)
        self.graphs[key] = captured
        for name, value in captured.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(micro[name])
        captured.graph.replay()
        return captured.loss

    def _warm_up(self, micro: Batch) -> None:
        """Compile kernels and create library handles: a capture cannot do that.

        A few tokens are enough, except for compiled layers.

        The random generator is restored, so a resumed run, which also warms up, draws equal masks.
        """
        kind = shape_key(micro) if self.compiled else "borders" in micro
        if kind in self.warm:
            return
        self.warm.add(kind)
        before, generator = self.flat.flat.clone(), torch.cuda.get_rng_state()
        few = micro if self.compiled else first_tokens(micro, WARM_UP_TOKENS)
        self.forward_backward(few, self.scale)
        self.flat.flat.copy_(before)
        torch.cuda.set_rng_state(generator)

    def _capture(self, micro: Batch) -> _Captured | None:
        while len(self.graphs) >= MAX_GRAPHS:
            self.graphs.popitem(last=False)
        # Memory cached by eager runs would remain in addition to the graphs' own pool.
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
    """The first tokens of the first row as one document; the loss covers their first half."""
    cut = dict(micro)
    for name in ("input_ids", "position_ids", "inputs_embeds"):
        if name in cut:
            cut[name] = cut[name][:1, :count]
    length = cut["inputs_embeds" if "inputs_embeds" in cut else "input_ids"].shape[1]
    if "borders" in cut:
        cut["borders"] = cut["borders"].clamp(max=length)
        cut["borders"][1:] = length
    half = min(length // 2, len(cut["targets"]))
    cut["targets"] = cut["targets"][:half]
    cut |= {name: cut[name][:half] for name in cut if _of_targets(name)}
    cut["positions"] = torch.arange(half, device=cut["targets"].device)
    return cut


def shape_key(micro: Batch) -> tuple[Any, ...]:
    """Properties that a graph depends on: shapes, and the longest document's bucket."""
    shapes = ((k, tuple(v.shape)) for k, v in sorted(micro.items()) if isinstance(v, Tensor))
    return (*shapes, micro.get("longest"))


def to_bucket(micro: Batch) -> Batch:
    """Pad the micro-batch to one of a few shapes; added tokens have no target.

    A packed row gets one more document of padding; rows of one length are unchanged. The number of
    supervised tokens has eight sizes for each number of tokens.
    """
    padded = {k: v for k, v in micro.items() if k not in ("lengths", "attention_mask")}
    tokens = micro["input_ids"].numel()
    if "borders" in micro:
        size = _round_up(tokens, TOKENS_STEP)
        pad = size - tokens
        padded["input_ids"] = nn.functional.pad(micro["input_ids"], (0, pad))
        padded["position_ids"] = nn.functional.pad(micro["position_ids"], (0, pad))
        count = _round_up(len(micro["borders"]) + 1, 16)
        borders = nn.functional.pad(
            micro["borders"], (0, count - len(micro["borders"])), value=size
        )
        padded["borders"] = borders
        padded["longest"] = min(_round_up(max(*micro["lengths"], pad), 512), size)
        tokens = size
    target_count = _round_up(micro["targets"].numel(), max(1, tokens // 8))
    extra = target_count - micro["targets"].numel()
    padded["positions"] = nn.functional.pad(micro["positions"], (0, extra))
    padded["targets"] = nn.functional.pad(micro["targets"], (0, extra), value=IGNORE)
    for name in filter(_of_targets, micro):
        padded[name] = nn.functional.pad(micro[name], (0, extra))
    return padded


def _of_targets(name: str) -> bool:
    """True for the values of an objective that a micro-batch has for each target."""
    return name == "sequence" or name.startswith("token_")


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
