"""Linear layers that share an input enter, with their adapters; one product a pass leaves.

q/k/v (and gate/up) are multiplied as one matrix: at 2,048 tokens gate and up apart fill 87% of an
H100's last wave of tiles, together 95%. Frozen 16-bit weights are moved into one buffer of which
the modules then hold views; NF4 weights are dequantized into one scratch buffer when needed.
Shapes: M tokens, K inputs, N outputs of all modules together, n adapted modules of rank R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.lora import lora_a_grad, lora_down, lora_input_grad_, matmul_float32
from lorakit.ops.nf4 import dequantize_nf4

Scratch = dict[tuple[str, int, int], Tensor]


class Unsupported(Exception):
    """This module cannot go under the engine; the message says why."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """The masks of one group in one forward pass: keys [n, 2] (None: no dropout), probability."""

    keys: Tensor | None
    p: float


@dataclass(frozen=True, slots=True)
class Adapted:
    """One adapted module: its columns of the group's output, its factors and scale."""

    columns: slice
    a: nn.Parameter
    b: nn.Parameter
    scale: float


class LoraGroup:
    """The frozen product of `modules` and their low-rank updates, forward and backward by hand."""

    def __init__(self, name: str, modules: Sequence[nn.Module], scratch: Scratch) -> None:
        self.name, self.scratch = name, scratch
        self.bases = [_base_layer(m) for m in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.inputs, self.outputs = self.bases[0].in_features, sum(self.sizes)
        ends = list(torch.tensor([0, *self.sizes]).cumsum(0).tolist())
        self.columns = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        self.adapted = [
            Adapted(columns, *found)
            for columns, module in zip(self.columns, modules, strict=True)
            if (found := _factors(module)) is not None
        ]
        ranks = {x.a.shape[0] for x in self.adapted}
        if len(ranks) > 1:
            raise Unsupported(f"ranks differ within {name} ({sorted(ranks)})")
        self.rank = ranks.pop() if ranks else 0
        self.p = _dropout(modules)
        self.bias = self._merged_bias()
        self.four_bit = hasattr(self.bases[0].weight, "quant_state")
        self.merged: Tensor | None = None
        kind = self.bases[0].compute_dtype if self.four_bit else self.bases[0].weight.dtype
        device = self.bases[0].weight.device
        self.kind = kind
        # Copies of the factors in the base's type; `refresh` fills them from the float32 masters.
        self.a = torch.empty(len(self.adapted) * self.rank, self.inputs, dtype=kind, device=device)
        self.b = [torch.empty_like(x.b, dtype=kind) for x in self.adapted]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapted module, in the order in which `backward` gives gradients."""
        return [p for x in self.adapted for p in (x.a, x.b)]

    def factors(self, training: bool) -> list[float]:
        """What the stored copies of A carry: alpha/r, and dropout's 1/(1-p) in training."""
        keep = 1 - self.p if training else 1.0
        return [x.scale / keep for x in self.adapted]

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
        """Give each module a weight of its own again: savers take shared storage for tied weights."""
        if self.merged is not None and len(self.bases) > 1:
            for base in self.bases:
                base.weight.data = base.weight.data.clone()
        self.merged = None

    def weight(self) -> Tensor:
        """The frozen weight [N, K]; of NF4 modules in scratch memory, until the next layer's."""
        if self.merged is not None:
            return self.merged
        key = (self.name, self.outputs, self.inputs)
        out = self.scratch.get(key)
        if out is None:
            out = torch.empty(
                self.outputs, self.inputs, dtype=self.kind, device=self.bases[0].weight.device
            )
            self.scratch[key] = out
        for base, rows in zip(self.bases, self.columns, strict=True):
            dequantize_nf4(base.weight.data, base.weight.quant_state, out[rows])
        return out

    def forward(
        self, x: Tensor, weight: Tensor, dropout: Dropout, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(S [M, n*R], y [M, N]) of x [M, K]; `residual` [M, N] is added to y."""
        s = lora_down(x, self.a, dropout.keys, dropout.p)
        if not self.adapted and self.bias is None and residual is None:
            return s, x @ weight.t()
        y = torch.empty(x.shape[0], self.outputs, dtype=x.dtype, device=x.device)
        start = residual if residual is not None else self.bias
        for own, b, part in zip(self.adapted, self.b, self._parts(), strict=True):
            if start is None:
                torch.mm(s[:, part], b.t(), out=y[:, own.columns])
            else:
                torch.addmm(start[..., own.columns], s[:, part], b.t(), out=y[:, own.columns])
        for columns in self._columns_without_adapter():
            y[:, columns] = 0.0 if start is None else start[..., columns]
        if residual is not None and self.bias is not None:
            y += self.bias
        return s, y.addmm_(x, weight.t())

    def input_grad(self, dy: Tensor, weight: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
        """(dS [M, n*R], dx [M, K]) from dy [M, N]."""
        ds = self.factor_signal(dy)
        dx = dy @ weight
        if self.adapted:
            lora_input_grad_(dx, ds, self.a, dropout.keys, dropout.p)
        return ds, dx

    def factor_signal(self, dy: Tensor) -> Tensor:
        """dS_i = dy_i B_i for all modules, [M, n*R]."""
        ds = torch.empty(dy.shape[0], self.a.shape[0], dtype=dy.dtype, device=dy.device)
        for own, b, part in zip(self.adapted, self.b, self._parts(), strict=True):
            torch.mm(dy[:, own.columns], b, out=ds[:, part])
        return ds

    def factor_grads(
        self, dy: Tensor, ds: Tensor, x: Tensor, s: Tensor, dropout: Dropout, training: bool
    ) -> list[Tensor]:
        """Gradients of `parameters`, in their order and in float32."""
        if not self.adapted:
            return []
        db = [
            matmul_float32(dy[:, own.columns].t(), s[:, part])
            for own, part in zip(self.adapted, self._parts(), strict=True)
        ]
        da = lora_a_grad(ds, x, dropout.keys, dropout.p, self.factors(training))
        return [g for pair in zip(da.split(self.rank), db, strict=True) for g in pair]

    def _parts(self) -> list[slice]:
        """Columns of S that belong to each adapted module."""
        return [slice(i * self.rank, (i + 1) * self.rank) for i in range(len(self.adapted))]

    def _columns_without_adapter(self) -> list[slice]:
        taken = {x.columns.start for x in self.adapted}
        return [c for c in self.columns if c.start not in taken]

    def _merged_bias(self) -> Tensor | None:
        biases = [base.bias for base in self.bases]
        if all(b is None for b in biases):
            return None
        if any(b is not None and b.requires_grad for b in biases):
            raise Unsupported("biases train")
        weight = self.bases[0].weight
        kind = weight.dtype if weight.is_floating_point() else self.bases[0].compute_dtype
        return torch.cat(
            [
                torch.zeros(n, dtype=kind, device=weight.device) if b is None else b.data.to(kind)
                for n, b in zip(self.sizes, biases, strict=True)
            ]
        )


def refresh(groups: Sequence[LoraGroup], training: bool) -> None:
    """Copy all factors into the base's type, A scaled: a few launches for the whole model."""
    copies, masters, scaled, factors = [], [], [], []
    for group in groups:
        parts = group.a.split(group.rank) if group.adapted else ()
        for part, b, own, factor in zip(
            parts, group.b, group.adapted, group.factors(training), strict=True
        ):
            copies += [part, b]
            masters += [own.a.data, own.b.data]
            scaled.append(part)
            factors.append(factor)
    if copies:
        torch._foreach_copy_(copies, masters)
        torch._foreach_mul_(scaled, factors)


def _base_layer(module: nn.Module) -> Any:
    base = getattr(module, "base_layer", module)
    kinds = {"Linear", "Linear4bit"}
    if type(base).__name__ not in kinds:
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
    found = {
        float(getattr(m.lora_dropout["default"], "p", 0.0))
        for m in modules
        if hasattr(m, "lora_dropout") and "default" in m.lora_dropout
    }
    if len(found) > 1:
        raise Unsupported("dropout differs within a group")
    return found.pop() if found else 0.0
