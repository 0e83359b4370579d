"""Fused LoRA linear layers: one product per pass for modules that share an input.

q/k/v (and gate/up) are multiplied as one matrix: at 2,048 tokens separate gate and up products fill
87% of an H100's last wave of tiles, the joint one 95%. Frozen 16-bit weights are moved to one
buffer of which the modules hold views; NF4 weights are dequantized to a scratch buffer when needed.
Shapes: M tokens, K inputs, N outputs of all modules together, n adapted modules of rank R.

`FlatGradients` keeps all gradients in one flat float32 buffer. The engine's groups add their
gradients to it directly, without autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.lora import (
    InputGrad,
    Update,
    lora_a_grad,
    lora_down,
    lora_input_grad_,
    matmul_float32,
)
from lorakit.ops.lora_output import lora_add, lora_output_grads
from lorakit.ops.nf4 import dequantize_nf4

Scratch = dict[tuple[str, int, int], Tensor]


class Unsupported(Exception):
    """The engine does not support this module; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Masks of one group in one forward pass: keys [n, 2] (None: no dropout), probability."""

    keys: Tensor | None
    p: float


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapted module: its columns of the group's output, its factors and its scale."""

    columns: slice
    a: nn.Parameter
    b: nn.Parameter
    scale: float


class FusedLoraLinear:
    """The frozen product of `modules` and their low-rank updates, with hand-written backward."""

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        scratch: Scratch,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.scratch = name, scratch
        self.bases = [_base_layer(m) for m in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.inputs, self.outputs = self.bases[0].in_features, sum(self.sizes)
        ends = itertools.accumulate(self.sizes, initial=0)
        self.columns = [slice(a, b) for a, b in itertools.pairwise(ends)]
        factors = [_factors(m) for m in modules]
        self.adapted = [LoraFactors(c, *f) for c, f in zip(self.columns, factors, strict=True) if f]
        slots = itertools.count()
        self.slots = tuple(next(slots) if f else -1 for f in factors)
        ranks, scales = {x.a.shape[0] for x in self.adapted}, {x.scale for x in self.adapted}
        if len(ranks) > 1 or len(scales) > 1:
            raise Unsupported(f"ranks or scales differ within {name}")
        self.rank, self.scale = (ranks or {0}).pop(), (scales or {1.0}).pop()
        self.p = _dropout(modules)
        self.four_bit = hasattr(self.bases[0].weight, "quant_state")
        self.merged: Tensor | None = None
        weight = self.bases[0].weight
        # Device of the computation; the frozen weights may be elsewhere until they are needed.
        self.device = device or weight.device
        self.bias = self._merged_bias()
        self.dtype = self.bases[0].compute_dtype if self.four_bit else weight.dtype
        # Copies of the factors in the base's dtype; `refresh` fills them from the float32 masters.
        options = {"dtype": self.dtype, "device": self.device}
        self.a = torch.empty(len(self.adapted) * self.rank, self.inputs, **options)
        self.b = torch.zeros(self.outputs, self.rank, **options)
        # Buffers for gradients that do not go through autograd, see `engine/cuda_graphs.py`.
        self.a_grad_buffer: Tensor | None = None
        self.b_grad_buffer: Tensor | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapted module, in the order in which `backward` gives gradients."""
        return [p for x in self.adapted for p in (x.a, x.b)]

    def factor(self, training: bool) -> float:
        """Factor in the stored copy of A: alpha/r, and dropout's 1/(1-p) in training."""
        return self.scale / (1 - self.p if training else 1.0)

    def merge(self) -> None:
        """Move dense weights of several modules into one buffer; each keeps a view of its rows."""
        if self.four_bit:
            return
        if len(self.bases) == 1:
            self.merged = self.bases[0].weight.data
            return
        self.merged = torch.cat([base.weight.data for base in self.bases])
        for base, rows in zip(self.bases, self.columns, strict=True):
            base.weight.data = self.merged[rows]

    def unmerge(self) -> None:
        """Give each module separate storage again: savers take shared storage for tied weights."""
        if self.merged is not None and len(self.bases) > 1:
            for base in self.bases:
                base.weight.data = base.weight.data.clone()
        self.merged = None

    def base_tensors(self) -> list[Tensor]:
        """Tensors of which `weight` consists: the merged matrix, or NF4 weights and scales."""
        if self.merged is not None:
            return [self.merged]
        tensors = []
        for base in self.bases:
            state = base.weight.quant_state
            tensors += [base.weight.data, state.absmax]
            tensors += [state.state2.absmax] if state.nested else []
        return tensors

    def constants_to_device(self) -> None:
        """Copy NF4's code books and offset, a few hundred numbers, to the compute device."""
        if not self.four_bit:
            return
        for base in self.bases:
            state = base.weight.quant_state
            state.code = state.code.to(self.device)
            if state.nested:
                state.offset = state.offset.to(self.device)
                state.state2.code = state.state2.code.to(self.device)

    def set_base_storage(self, tensors: Sequence[Tensor]) -> None:
        """Make the modules use `tensors`, in the order of `base_tensors`."""
        if self.merged is not None:
            (self.merged,) = tensors
            for base, rows in zip(self.bases, self.columns, strict=True):
                base.weight.data = self.merged[rows]
            return
        remaining = iter(tensors)
        for base in self.bases:
            state = base.weight.quant_state
            base.weight.data, state.absmax = next(remaining), next(remaining)
            if state.nested:
                state.state2.absmax = next(remaining)

    def weight(self) -> Tensor:
        """The frozen weight [N, K]; for NF4 in scratch memory that the next layer overwrites."""
        if self.merged is not None:
            return self.merged
        key = (self.name, self.outputs, self.inputs)
        out = self.scratch.get(key)
        if out is None:
            out = torch.empty(self.outputs, self.inputs, dtype=self.dtype, device=self.device)
            self.scratch[key] = out
        for base, rows in zip(self.bases, self.columns, strict=True):
            dequantize_nf4(base.weight.data, base.weight.quant_state, out[rows])
        return out

    def forward(
        self, x: Tensor, weight: Tensor, dropout: Dropout, out: Tensor | None = None
    ) -> tuple[Tensor, Update | None]:
        """(x W^T + bias [M, N], the adapters' update, which the consumer adds)."""
        if self.bias is None:
            y = torch.mm(x, weight.t(), out=out)
        else:
            y = torch.addmm(self.bias, x, weight.t(), out=out)
        if not self.adapted:
            return y, None
        s = lora_down(x, self.a, dropout.keys, dropout.p)
        return y, Update(s, self.b, self.slots)

    def forward_residual(
        self,
        x: Tensor,
        weight: Tensor,
        dropout: Dropout,
        residual: Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Update | None]:
        """(residual + x W^T + bias + update [M, N], update), for a single module."""
        start = residual if self.bias is None else residual + self.bias
        if not self.adapted:
            return torch.addmm(start, x, weight.t(), out=out), None
        update = Update(lora_down(x, self.a, dropout.keys, dropout.p), self.b, self.slots)
        return lora_add(start, update, out).addmm_(x, weight.t()), update

    def output_grads(self, dy: Tensor, update: Update | None) -> tuple[Tensor, Tensor | None]:
        """(dS [M, n*R], dB [N', R] float32) from dy [M, N]; dB None if added to its buffer."""
        if update is None:
            return dy.new_empty(dy.shape[0], 0), None
        columns = [x.columns for x in self.adapted]
        ds, db = lora_output_grads(dy, update, columns, self.b_grad_buffer)
        return ds, db if self.b_grad_buffer is None else None

    def s_grad(self, dy: Tensor) -> Tensor:
        """dS [M, R] of a single module before S is available; see `b_grad`."""
        return dy @ self.b if self.adapted else dy.new_empty(dy.shape[0], 0)

    def b_grad(self, dy: Tensor, s: Tensor) -> None:
        """Add dB of a single module to its buffer, the other half of `output_grads`."""
        if self.adapted:
            matmul_float32(dy.t(), s, self.b_grad_buffer)

    def input_grad(self, dy: Tensor, ds: Tensor, weight: Tensor, dropout: Dropout) -> Tensor:
        """dx [M, K]."""
        dx = dy @ weight
        if self.adapted:
            lora_input_grad_(dx, ds, self.a, dropout.keys, dropout.p)
        return dx

    def to_input_grad(self, ds: Tensor, dropout: Dropout) -> InputGrad | None:
        """The adapter's part of dy W, which the consumer adds in its kernel; a single module."""
        return InputGrad(ds, self.a, dropout.keys, dropout.p) if self.adapted else None

    def factor_grads(
        self, ds: Tensor, db: Tensor | None, x: Tensor, dropout: Dropout, training: bool
    ) -> list[Tensor | None]:
        """Gradients of `parameters` in their order, float32; None if added to the buffers."""
        if not self.adapted:
            return []
        factor = self.factor(training)
        da = lora_a_grad(ds, x, dropout.keys, dropout.p, factor, self.a_grad_buffer)
        if db is None:
            return [None] * (2 * len(self.adapted))
        widths = [factors.b.shape[0] for factors in self.adapted]
        pairs = zip(da.split(self.rank), db.split(widths), strict=True)
        return [g for pair in pairs for g in pair]

    def _s_columns(self) -> list[slice]:
        """Columns of S that belong to each adapted module."""
        return [slice(i * self.rank, (i + 1) * self.rank) for i in range(len(self.adapted))]

    def _merged_bias(self) -> Tensor | None:
        biases = [base.bias for base in self.bases]
        if all(b is None for b in biases):
            return None
        if any(b is not None and b.requires_grad for b in biases):
            raise Unsupported("biases train")
        weight = self.bases[0].weight
        dtype = weight.dtype if weight.is_floating_point() else self.bases[0].compute_dtype
        return torch.cat(
            [
                torch.zeros(n, dtype=dtype) if b is None else b.data.cpu().to(dtype)
                for n, b in zip(self.sizes, biases, strict=True)
            ]
        ).to(self.device)


def refresh(groups: Sequence[FusedLoraLinear], training: bool) -> None:
    """Copy all factors to the base's dtype, A scaled: a few launches for the complete model."""
    copies, masters, scaled, factors = [], [], [], []
    for group in groups:
        for module, rows in zip(group.adapted, group._s_columns(), strict=True):
            copies += [group.a[rows], group.b[module.columns]]
            masters += [module.a.data, module.b.data]
            scaled.append(group.a[rows])
            factors.append(group.factor(training))
    if copies:
        torch._foreach_copy_(copies, masters)
        torch._foreach_mul_(scaled, factors)


def in_flat_order(groups: Sequence[FusedLoraLinear]) -> list[nn.Parameter]:
    """The parameters in the order of a flat gradient buffer: for each group all A, then all B."""
    return [p for g in groups for p in (*(x.a for x in g.adapted), *(x.b for x in g.adapted))]


def point_sinks(groups: Sequence[FusedLoraLinear], flat: Tensor) -> None:
    """Make each group add gradients to its part of `flat` [float32], see `in_flat_order`."""
    start = 0
    for group in groups:
        if not group.adapted:
            continue
        size = group.a.numel()
        group.a_grad_buffer = flat[start : start + size].view_as(group.a)
        start += size
        size = sum(x.b.numel() for x in group.adapted)
        group.b_grad_buffer = flat[start : start + size].view(-1, group.rank)
        start += size


def _base_layer(module: nn.Module) -> Any:
    base: Any = getattr(module, "base_layer", module)
    supported = {"Linear", "Linear4bit"}
    if type(base).__name__ not in supported:
        raise Unsupported(f"a layer is a {type(base).__name__}")
    if type(base).__name__ == "Linear4bit" and base.weight.quant_state is None:
        raise Unsupported("4-bit weights are not quantized yet")
    if base.weight.requires_grad:
        raise Unsupported("base weights train")
    return base


def _factors(module: Any) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """(A, B, scale) of a LoRA module; None for a plain linear layer."""
    if not hasattr(module, "lora_A"):
        return None
    name = "default"
    if list(module.lora_A) != [name] or list(module.active_adapters) != [name]:
        raise Unsupported("several adapters")
    if module.merged or getattr(module, "lora_variant", {}).get(name) is not None:
        raise Unsupported("DoRA or another variant of LoRA")
    if module.lora_embedding_A or getattr(module, "lora_bias", {}).get(name):
        raise Unsupported("adapters with a bias")
    if getattr(module, "fan_in_fan_out", False):
        raise Unsupported("transposed weights")
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def _dropout(modules: Sequence[Any]) -> float:
    probabilities = {
        float(getattr(m.lora_dropout["default"], "p", 0.0))
        for m in modules
        if hasattr(m, "lora_dropout") and "default" in m.lora_dropout
    }
    if len(probabilities) > 1:
        raise Unsupported("dropout differs within a group")
    return probabilities.pop() if probabilities else 0.0


class FlatGradients:
    """Flat buffer of the gradients of `parameters`, `groups` first; their .grad become views."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], groups: Sequence[FusedLoraLinear]
    ) -> None:
        ordered = in_flat_order(groups)
        known = {id(p) for p in ordered}
        self.parameters = ordered + [p for p in parameters if id(p) not in known]
        sizes = [p.numel() for p in self.parameters]
        device = self.parameters[0].device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.grads = [
            flat.view_as(p) for flat, p in zip(self.flat.split(sizes), self.parameters, strict=True)
        ]
        point_sinks(groups, self.flat)

    def begin(self) -> None:
        """Start an optimizer step: zero the gradients, and assign each parameter its view."""
        self.flat.zero_()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
