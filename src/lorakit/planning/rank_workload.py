"""Counts of one rank, from which every part of a plan is computed.

A rank works on its part of a step's examples; the counts are those of the rank with the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.model.param_counts import ParamCounts, Shape, count, count_trainable
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# NF4: half a byte a weight, one int8 scale per 64, one float32 scale per 256 of those
# (QLoRA, arXiv 2305.14314, section 3: 0.127 bits of constants a weight instead of 0.5).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def examples_of_rank(recipe: Recipe, ranks: int) -> int:
    """Examples of a step on the rank with the most of them."""
    return -(-recipe.examples_per_step // ranks)


@dataclass(frozen=True, slots=True)
class RankWorkload:
    """Counts of one rank."""

    recipe: Recipe
    config: Any  # of the text model
    counted: ParamCounts
    width: int  # bytes of a stored number
    cuda: bool
    fast: bool  # a GPU on which the engine is used by default
    ranks: int
    per_node: int
    linear: int  # elements of linear layers
    adapter: int  # elements that train
    context_bytes: int | None  # of CUDA, if measured

    @classmethod
    def of(cls, recipe: Recipe, config: Any, device: Device) -> RankWorkload:
        """Count for this recipe, model and device."""
        counted = count(config)
        return cls(
            recipe,
            config.get_text_config(),
            counted,
            BYTES[device.dtype],
            device.kind == "cuda",
            device.fast,
            device.ranks,
            device.per_node,
            counted.in_linear,
            count_trainable(recipe, counted),
            device.context_bytes,
        )

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.counted.linear

    @property
    def non_linear_params(self) -> int:
        return self.counted.total - self.linear - self.counted.experts

    @property
    def examples(self) -> int:
        """Examples of one step."""
        return examples_of_rank(self.recipe, self.ranks)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return min(self.recipe.micro_batch_size, self.examples) * self.recipe.cutoff_len

    @property
    def step_tokens(self) -> int:
        return self.examples * self.recipe.cutoff_len

    @property
    def inputs_bytes(self) -> int:
        """Bytes of one layer's inputs, for all micro-batches of a step."""
        return int(self.step_tokens * self.config.hidden_size * self.width)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the base's linear layers as stored, before sharding."""
        four_bit = self.recipe.method == "qlora"
        return int(self.linear * (NF4_BYTES if four_bit else self.width))
