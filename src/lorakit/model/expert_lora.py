"""PEFT's adapter of fused experts, computed as grouped low-rank products.

PEFT's `ParamWrapper` adds B A of every expert to a copy of all weights in each forward, needs
16-bit weights, and refuses dropout. This subclass keeps its parameters, their names and layout, so
that a saved adapter is one that PEFT loads (`target_parameters`): lora_A [E R, K], rows of expert
e from e R on; lora_B [N, R E], column j E + e for expert e and rank j. Dropout masks the input rows
of each expert.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from lorakit.model.grouped_experts import GroupedExperts, can_group, expert_modules, group_experts
from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.grouped_product import Counts, LowRankUpdate


class ExpertLora(ParamWrapper):
    """The adapter of one weight of an experts module; nested in, or around, that of another."""

    def __init__(
        self, base_layer: Any, adapter_name: str, parameter_name: str, config: Any, **more: Any
    ) -> None:
        without = copy.copy(config)
        without.lora_dropout = 0.0
        super().__init__(base_layer, adapter_name, parameter_name, config=without, **more)
        self.p = float(config.lora_dropout)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        shape = self.get_base_layer().expert_shapes[self.parameter_name]
        self.num_experts, self._param_ndim = shape[0], 3
        return shape[1], shape[2]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output, with the active adapter's update of this weight."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        if len(names) > 1:
            raise ValueError("several adapters of the same experts are active")
        updates = self.get_base_layer().updates
        updates[self.parameter_name] = lambda rows, counts: self._update(names[0], rows, counts)
        try:
            result = self.base_layer(x, *args, **kwargs)
        finally:
            updates.pop(self.parameter_name, None)
        return result

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does, into 16-bit weights only."""
        if self.parameter_name in self.get_base_layer().nf4:
            raise ValueError("experts in 4 bits cannot be merged; dequantize the base first")
        super().merge(*args, **kwargs)

    def _update(self, name: str, rows: Tensor, counts: Counts) -> Tensor:
        experts, rank = self.num_experts, self.r[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        p = self.p if self.training else 0.0
        key = draw_keys(1, rows.device)[0] if p else None
        update: Tensor = LowRankUpdate.apply(
            rows,
            a.view(experts, rank, -1),
            b.view(-1, rank, experts).permute(2, 0, 1),
            key,
            p,
            self.scaling[name] / (1 - p),
            counts,
        )
        return update


# PEFT knows wrappers that may be nested by the name of their class.
ExpertLora.__name__ = "ParamWrapper"


def expert_parameters(model: Any) -> list[str]:
    """`target_parameters` for all experts: last module of the name and the weight, sorted."""
    names = set()
    for path, module in expert_modules(model):
        if can_group(module):
            leaf = path.removesuffix(".base_layer").rpartition(".")[2]
            names |= {
                f"{leaf}.{name}"
                for name, p in module.named_parameters(recurse=False)
                if p.dim() == 3 or name in getattr(module, "expert_shapes", ())
            }
    return sorted(names)


def adapt_experts(config: Any, base: Any) -> None:
    """Make this LoraConfig adapt all experts of `base`, which are grouped, by `ExpertLora`."""
    group_experts(base, next(p.dtype for p in base.parameters() if p.is_floating_point()))
    config.target_parameters = expert_parameters(base)
    use_expert_lora(config)


def use_expert_lora(config: Any) -> Any:
    """Make this LoraConfig build `ExpertLora` for grouped experts; returns it."""
    config._register_custom_module({GroupedExperts: ExpertLora})
    return config


def load_tuned(base: Any, folder: Path) -> Any:
    """Attach a saved adapter to its base, that of grouped experts included, as PEFT does."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if config.target_parameters:
        use_expert_lora(config)
    return PeftModel.from_pretrained(base, str(folder), config=config)
