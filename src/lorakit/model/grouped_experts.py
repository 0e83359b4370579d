"""Compute fused experts of transformers with our own products: in 4 bits, or with adapters.

transformers keeps the experts of a layer in raw tensors, `gate_up_proj` [E, 2 I, D] and `down_proj`
[E, D, I] (gpt-oss transposed, Nemotron with `up_proj`). `group_experts` gives such a module of one
model instance a subclass that keeps its names and sorts tokens by expert. Frozen weights may be
NF4 (`ops/nf4_experts.py`): the parameter then holds the packed bytes, and `nf4` the scales.
Adapters are added by `model/expert_lora.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from lorakit.model.layer_widths import expert_elements
from lorakit.ops.expert_rows import Combine, Dispatch
from lorakit.ops.glu import GatedActivation
from lorakit.ops.grouped_product import (
    GROUP_BYTES,
    Counts,
    FrozenProduct,
    experts_at_once,
    has_grouped_mm,
)
from lorakit.ops.nf4_experts import Nf4Experts, dequantize_experts, quantize_experts, rows_of

# Parts of NF4 experts, one per expert.
STREAMED = ("packed", "absmax", "absmax2", "offset")
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
# Set by transformers' `use_experts_implementation`; experts without them compute in another way
# (Llama 4's get the same number of rows each).
_LAYOUT = ("has_gate", "has_bias", "is_transposed")
# Rows per expert from which almost every expert has some.
ROWS_FOR_ALL = 16
# Activations that `ops/glu.py` computes, by their classes in transformers and torch.
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}


class GroupedExperts(nn.Module):
    """Mixed into the class of an experts module by `group_experts`."""

    expert_shapes: dict[str, tuple[int, int, int]]  # [E, ., .] of each weight, as stored in 16 bits
    nf4: dict[str, Nf4Experts]  # empty while the weights are in 16 bits
    compute_dtype: torch.dtype
    updates: dict[str, Any]  # adapters that are active in this call, by weight
    compute_device: torch.device  # of streamed experts
    dense_bytes: int  # most bytes of dense weights at once
    fetch: Callable[[], None] | None  # copies streamed weights to the GPU, before each forward
    # In a comparison of two computations: the experts chosen in the first call, for all others.
    # Rounding may exchange two experts of nearly equal scores, and that is no fault.
    routing: dict[str, Tensor] | None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts, weighted by the router: [T, D] -> [T, D]."""
        if self.fetch is not None:
            self.fetch()
        if self.routing is not None:
            top_k_index = self.routing.setdefault("index", top_k_index)
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = self.rows_of_experts(experts, hidden_states)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        tokens = hidden_states.to(self.compute_dtype)
        x: Tensor = Dispatch.apply(tokens, order, back, top_k_index.shape[-1])
        own: Any = self  # attributes of the class that this one is mixed into
        if own.has_gate:
            inner = self._gated(self._product("gate_up_proj", x, experts, counts))
        else:
            inner = own.act_fn(self._product("up_proj", x, experts, counts))
        y = self._product("down_proj", inner, experts, counts)
        if getattr(own, "has_post_expert_norm", False):
            y = own.post_expert_norm(y)
        combined: Tensor = Combine.apply(y, top_k_weights, order, back)
        return combined.to(hidden_states.dtype)

    def rows_of_experts(self, experts: Tensor, tokens: Tensor) -> Counts:
        """The number of rows of each expert, from the sorted experts of all rows.

        The GPU's own numbers, if the products can work without the host; else only experts with
        rows are dequantized.
        """
        if self._all_at_once(len(experts), tokens):
            numbers = torch.arange(self.number, device=experts.device)
            return torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return self.tokens_per_expert(experts)

    def tokens_per_expert(self, experts: Tensor) -> list[int]:
        """Count the rows of each expert, on the host."""
        counts: list[int] = torch.bincount(experts, minlength=self.number).tolist()
        return counts

    def _all_at_once(self, rows: int, tokens: Tensor) -> bool:
        """True if the dense weights of all experts are made together, whatever their rows."""
        sizes = [self.sizes(name) for name in self.expert_shapes]
        probe = tokens.new_empty(0, 8, dtype=self.compute_dtype)
        return (
            rows >= ROWS_FOR_ALL * self.number
            and all(self._most(name) >= self.number for name in self.expert_shapes)
            and has_grouped_mm(probe, *(size for pair in sizes for size in pair))
        )

    def _most(self, name: str) -> int:
        return experts_at_once(*self.sizes(name), self.compute_dtype, self.dense_bytes)

    def _gated(self, gate_up: Tensor) -> Tensor:
        own, kind = self, type(self)  # type: Any, Any
        known = _ACTIVATIONS.get(type(getattr(own, "act_fn", None)).__name__)
        if known and kind._apply_gate is _default_apply_gate:
            inner: Tensor = GatedActivation.apply(gate_up, known)
        else:
            inner = own._apply_gate(gate_up)
        return inner

    @property
    def number(self) -> int:
        """Number of experts."""
        return next(iter(self.expert_shapes.values()))[0]

    def sizes(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of one expert's product with this weight."""
        _, first, second = self.expert_shapes[name]
        transposed: Any = self.is_transposed
        return (second, first) if transposed else (first, second)

    def dense(self, name: str, experts: Sequence[int]) -> Tensor:
        """Weights [G, outputs, inputs] of these experts in the compute dtype."""
        if name in self.nf4:
            weights = dequantize_experts(self.nf4[name], experts, self.compute_dtype)
        else:
            weights = rows_of(getattr(self, name).detach(), experts)
        return weights.transpose(1, 2) if self.is_transposed else weights

    def _product(self, name: str, x: Tensor, experts: Tensor, counts: Counts) -> Tensor:
        dense = functools.partial(self.dense, name)
        x = x.to(self.compute_dtype)
        y: Tensor = FrozenProduct.apply(x, dense, counts, self.sizes(name)[0], self._most(name))
        if self.has_bias:
            y += getattr(self, f"{name}_bias")[experts].to(y.dtype)
        update = self.updates.get(name)
        if update is not None:
            y += update(x, counts)
        return y

    def quantize_(self, name: str, weights: Tensor) -> nn.Parameter:
        """Keep `weights` [E, ., .] as NF4; returns the parameter with the packed values."""
        self.keep_nf4(name, quantize_experts(weights))
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def keep_nf4(self, name: str, stored: Nf4Experts) -> None:
        """Make `stored` this weight, its packed values as the parameter."""
        # In place in the order of parameters, which is the nesting of PEFT's wrappers.
        setattr(self, name, nn.Parameter(stored.packed, requires_grad=False))
        getattr(self, name).quant_state = stored
        self.nf4[name] = stored

    def base_tensors(self) -> list[Tensor]:
        """Tensors that are copied to the GPU if the experts are streamed: weights and scales."""
        tensors = []
        for name in self.expert_shapes:
            stored = self.nf4.get(name)
            if stored is None:
                tensors.append(getattr(self, name).data)
            else:
                tensors += [getattr(stored, field) for field in STREAMED]
        return tensors

    def set_base_storage(self, tensors: Sequence[Tensor]) -> None:
        """Use `tensors`, in the order of `base_tensors`."""
        remaining = iter(tensors)
        for name in self.expert_shapes:
            stored = self.nf4.get(name)
            if stored is None:
                getattr(self, name).data = next(remaining)
                continue
            for field in STREAMED:
                setattr(stored, field, next(remaining))
            getattr(self, name).data = stored.packed

    def constants_to_device(self) -> None:
        """Copy the code books, which all experts share, to the compute device."""
        for stored in self.nf4.values():
            stored.code = stored.code.to(self.compute_device)
            stored.code2 = stored.code2.to(self.compute_device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move as any module; scales follow the packed values and keep their dtypes."""
        super()._apply(fn, recurse)
        for name, stored in self.nf4.items():
            packed = getattr(self, name).data
            for field, tensor in stored.tensors().items():
                setattr(stored, field, packed if field == "packed" else tensor.to(packed.device))
        return self

    def release(self) -> None:
        """Give the module its own class and 16-bit weights again."""
        for name in list(self.nf4):
            weights = dequantize_experts(self.nf4[name], range(self.number), self.compute_dtype)
            setattr(self, name, nn.Parameter(weights, requires_grad=False))
            del self.nf4[name]
        for attribute in GroupedExperts.__annotations__:
            self.__dict__.pop(attribute, None)
        self.__class__ = type(self).__mro__[2]


_CLASSES: dict[type, type] = {}


def _grouped(kind: type) -> type:
    """The class of a grouped experts module; one for each kind."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(
            kind.__name__, (GroupedExperts, kind), {"__module__": kind.__module__}
        )
    return _CLASSES[kind]


def expert_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules with fused experts, and their names."""
    for name, module in model.named_modules():
        if isinstance(module, GroupedExperts) or expert_elements(name, module):
            yield name, module


def can_group(module: Any) -> bool:
    """True if `group_experts` supports this experts module."""
    if isinstance(module, GroupedExperts):
        return True
    names = {name for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return all(hasattr(module, name) for name in _LAYOUT) and names <= set(WEIGHTS)


def group_experts(model: Any, dtype: torch.dtype) -> list[Any]:
    """Give all fused experts of this instance our products, in place; returns the modules.

    Args:
        dtype: of the products; that of the weights while they are in 16 bits.
    """
    grouped = []
    for _, module in list(expert_modules(model)):
        if isinstance(module, GroupedExperts) or not can_group(module):
            continue
        weights = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        module.__class__ = _grouped(type(module))
        module.expert_shapes = {name: tuple(p.shape) for name, p in weights.items()}
        module.nf4, module.updates, module.compute_dtype = {}, {}, dtype
        module.dense_bytes, module.routing, module.fetch = GROUP_BYTES, None, None
        grouped.append(module)
    return grouped


def quantize_all(model: Any, dtype: torch.dtype) -> None:
    """Quantize experts that were loaded in 16 bits, one tensor at a time, in place."""
    group_experts(model, dtype)
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            for name in module.expert_shapes:
                if name not in module.nf4:
                    module.quantize_(name, getattr(module, name).detach())


def release_experts(model: Any) -> None:
    """Undo `group_experts`, dequantizing weights."""
    for module in list(model.modules()):
        if isinstance(module, GroupedExperts):
            module.release()


def set_dense_bytes(model: Any, memory_bytes: int) -> None:
    """Let experts make 1% of the memory as dense weights at once, if that is more than 256 MiB.

    Those of all 128 experts of Qwen3-30B-A3B's gate and up take 0.8 GB.

    Args:
        memory_bytes: of the device, or the run's limit.
    """
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.dense_bytes = max(GROUP_BYTES, memory_bytes // 100)
