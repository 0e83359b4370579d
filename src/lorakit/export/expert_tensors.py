"""Find the tensors of a base's files that hold a fused tensor of experts, and merge one expert.

The hub's files have a tensor per expert and projection for most families (`experts.3.gate_proj`),
which transformers stacks into `experts.gate_up_proj` [E, 2 I, D]; others store the fused tensor.
Both are merged expert by expert, as training has them: gate and up of an expert are one NF4 tensor
with one mean scale. Of an expert e with PEFT's factors A [E R, K] and B [N, R E]:

    W'_e = W_e + s B_e A_e        A_e = A[e R : (e + 1) R]        B_e = B[:, e :: E]

(transposed where a family stores inputs before outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.export.hub_names import stored_names
from lorakit.model.grouped_experts import can_group, expert_modules
from lorakit.model.safetensors_io import Stored


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Place of a stored tensor: rows of one expert of a parameter; all of it if `expert` is -1."""

    place: str
    expert: int
    rows: slice


def expert_places(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the raw tensors of experts whose products are known."""
    return {
        f"{path}.{name}": tuple(tensor.shape)
        for path, module in expert_modules(model)
        if can_group(module)
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.dim() == 3
    }


def find_parts(model: Any, stored: Mapping[str, Stored]) -> dict[str, ExpertPart]:
    """Find the stored tensors that transformers combines into tensors of experts.

    transformers splits a tensor in which each row has its own number; the numbers in a stored
    tensor tell expert and rows, whatever the names are. Tensors of which not all parts are found
    are left out.
    """
    import torch

    found: dict[str, ExpertPart] = {}
    for place, (number, rows, _) in expert_places(model).items():
        numbers = torch.arange(number * rows).view(number, rows, 1)
        parts: dict[str, ExpertPart] = {}
        for name, piece in stored_names(model, {place: numbers}).items():
            values = piece.flatten()
            first = int(values[0])
            single = tuple(piece.shape) == (len(values), 1)
            whole = piece.shape == numbers.shape
            ordered = torch.equal(values, torch.arange(first, first + len(values)))
            if name not in stored or not ordered or not (single or whole):
                break
            start = first % rows
            inside = slice(None) if whole else slice(start, start + len(values))
            parts[name] = ExpertPart(place, -1 if whole else first // rows, inside)
        else:
            found |= parts
    return found


class ExpertWeights:
    """Read experts from the base's files as training has them.

    Args:
        round_trip: from 16 bits to the values in training; None if they stay.
    """

    def __init__(
        self,
        parts: Mapping[str, ExpertPart],
        stored: Mapping[str, Stored],
        prepare: Callable[[Any], Any],
        round_trip: Callable[[Any], Any] | None,
    ) -> None:
        self.stored, self.prepare, self.round_trip = stored, prepare, round_trip
        self.siblings: dict[tuple[str, int], list[tuple[slice, str]]] = {}
        for name, part in parts.items():
            self.siblings.setdefault((part.place, part.expert), []).append((part.rows, name))

    def read(self, name: str, part: ExpertPart, update: Callable[[int], Any] | None) -> Any:
        """The stored tensor's values in training plus `update(expert)`, in the stored layout.

        Args:
            update: float32 s B A of one expert, in the layout of the parameter.
        """
        import torch

        if part.expert < 0:
            value = self.stored[name].read()
            experts = [self._summed(v, i, update) for i, v in enumerate(value)]
            return torch.stack(experts)
        pieces = sorted(self.siblings[part.place, part.expert], key=lambda piece: piece[0].start)
        weight = torch.cat([self.stored[sibling].read() for _, sibling in pieces])
        return self._summed(weight, part.expert, update)[part.rows]

    def _summed(self, weight: Any, expert: int, update: Callable[[int], Any] | None) -> Any:
        value = self.prepare(weight)
        if self.round_trip is not None:
            value = self.round_trip(value)
        return value if update is None else value.float() + update(expert)


def expert_update(wrapper: Any, expert: int) -> Any:
    """Float32 s B_e A_e of a PEFT wrapper, in the layout of its parameter."""
    name = wrapper.active_adapters[0]
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    number, rank = wrapper.num_experts, wrapper.r[name]
    update = wrapper.scaling[name] * (b[:, expert::number] @ a[expert * rank : (expert + 1) * rank])
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    return update.t() if transposed else update


def wrapper_of(model: Any, place: str) -> Any:
    """PEFT's wrapper of a raw tensor of experts, by its name in the base; None without one."""
    path, _, name = place.rpartition(".")
    module = model.get_submodule(path)
    while hasattr(module, "parameter_name"):
        if module.parameter_name == name:
            return module
        module = module.base_layer
    return None
