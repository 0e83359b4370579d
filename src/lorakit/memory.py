"""A recipe and a model's config enter; a MemoryPlan leaves: bytes per part, without any weights.

Shapes come from the model built on the meta device, so every architecture transformers knows is
counted exactly. Weights, adapters, gradients and optimizer are arithmetic; what layers keep for
backward is counted tensor by tensor for the engine, and estimated for a model's own layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import RecipeError
from lorakit.model.count import Counted, Shape, count, targets, trained
from lorakit.model.families import FAST_FAMILIES
from lorakit.recipe import Recipe
from lorakit.records import ON_CARD, Device, MemoryPlan, Placement

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# NF4: half a byte a weight, one int8 scale per 64, one float32 scale per 256 of those
# (QLoRA, arXiv 2305.14314, section 3: 0.127 bits of constants a weight instead of 0.5).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "adafactor": 0.5,
    "sgd": 0.0,
}
# Context, kernels and library workspaces that the driver sees beside torch's allocator.
CUDA_CONTEXT_BYTES = 840 * 1024**2

# From here on heads go through attention in groups: its buffers for all would be GBs, and one group
# fills a card (benchmarks/results/time_link.json).
LONG_ROW = 32768


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Counts that every part of the plan is made of."""

    recipe: Recipe
    config: Any  # of the text model
    counted: Counted
    width: int  # bytes of a stored number
    cuda: bool

    @classmethod
    def of(cls, recipe: Recipe, config: Any, device: Device) -> _Sizes:
        """Counted for this recipe, model and device."""
        text = config.get_text_config()
        return cls(recipe, text, count(config), BYTES[device.dtype], device.kind == "cuda")

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.counted.linear

    @property
    def linear(self) -> int:
        return self.counted.in_linear

    @property
    def others(self) -> int:
        return self.counted.total - self.linear - self.counted.experts

    @property
    def adapter(self) -> int:
        return trained(self.recipe, self.counted)

    @property
    def tokens(self) -> int:
        return self.recipe.micro_batch_size * self.recipe.cutoff_len

    @property
    def step_tokens(self) -> int:
        return self.recipe.examples_per_step * self.recipe.cutoff_len

    @property
    def inputs_bytes(self) -> int:
        """One layer's inputs, of all micro-batches of a step."""
        return int(self.step_tokens * self.config.hidden_size * self.width)

    @property
    def frozen_bytes(self) -> int:
        four_bit = self.recipe.method == "qlora"
        return int(self.linear * (NF4_BYTES if four_bit else self.width))


def plan_memory(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Predict the peak of a training run on `device`, and choose what is recomputed to make it fit.

    Args:
        recipe: with `target_modules` resolved. `gradient_checkpointing` false keeps everything,
            true keeps each layer's input alone, `auto` recomputes as little as the budget allows.
        config: the transformers config of the base model.
        device: where it will run; its memory, or the recipe's `memory_limit`, is the budget.

    Raises:
        RecipeError: `streaming: on` where the fast layers do not serve.
    """
    sizes = _Sizes.of(recipe, config, device)
    engine = _engine(sizes)
    if recipe.streaming == "on" and not (engine and recipe.modules_to_save is None):
        raise RecipeError(
            "streaming: on needs the fast layers, and they do not serve this recipe (model family "
            f"{sizes.config.model_type}, engine: {recipe.engine}; DoRA, trained biases and "
            "modules_to_save do not go with them)",
            hint="set streaming: auto, and memory_limit if it must fit",
        )
    budget = recipe.memory_limit_bytes or int(0.95 * device.memory_bytes)
    plan = None
    for keep, placement in _choices(recipe, sizes, engine):
        plan = _planned(sizes, keep, placement, device)
        if plan.total_bytes <= budget:
            filled = _fill(placement, sizes, budget - plan.total_bytes)
            plan = replace(_planned(sizes, keep, filled, device), fits=True)
            break
    assert plan is not None
    return plan


def plan_of(
    recipe: Recipe, config: Any, device: Device, keep: Sequence[int], placement: Placement
) -> MemoryPlan:
    """The bytes of a choice made already, as a result carries it."""
    sizes = _Sizes.of(recipe, config, device)
    plan = _planned(sizes, tuple(keep), placement, device)
    return replace(plan, fits=plan.total_bytes <= device.memory_bytes)


def _planned(
    sizes: _Sizes, keep: tuple[int, ...], placement: Placement, device: Device
) -> MemoryPlan:
    engine = _engine(sizes)
    parts = _fixed_parts(sizes, placement, engine)
    if placement.layer_major:
        parts |= _layer_major_parts(sizes, placement)
    else:
        parts |= _working_parts(sizes, keep, engine)
    host = _host_parts(sizes, placement)
    return MemoryPlan(parts, device.memory_bytes, False, keep, placement, host)


def _fill(placement: Placement, sizes: _Sizes, room: int) -> Placement:
    """Keep on the card the inputs of as many layers as there is room for."""
    if not placement.layer_major:
        return placement
    count = (room + _under_way(sizes, placement)) // sizes.inputs_bytes
    return replace(placement, inputs_on_card=min(sizes.layers, count))


def _engine(sizes: _Sizes) -> bool:
    """As `attach_loss` decides: `auto` on cards with kernels only."""
    recipe = sizes.recipe
    wanted = sizes.cuda or recipe.engine == "on" or recipe.streaming == "on"
    return expects_engine(recipe, sizes.config) and wanted


def expects_engine(recipe: Recipe, config: Any) -> bool:
    """Whether the fast layers are likely to serve; `attach_engine` decides on the real model."""
    plain = not recipe.use_dora and recipe.bias == "none"
    return recipe.engine != "off" and plain and config.model_type in FAST_FAMILIES


def _choices(
    recipe: Recipe, sizes: _Sizes, engine: bool
) -> Iterator[tuple[tuple[int, ...], Placement]]:
    """(what layers keep, what lies where), cheapest in speed first."""
    layers, chosen = sizes.layers, recipe.gradient_checkpointing
    if recipe.streaming == "on":
        yield from _layer_major_choices(recipe, sizes, (True,))
        return
    if chosen != "auto":
        yield (3 if chosen else 0,) * layers, ON_CARD
        return
    if not engine:
        yield (0,) * layers, ON_CARD
        yield (3,) * layers, ON_CARD
        return
    yield (0,) * layers, ON_CARD
    for level in range(3):
        for more in range(1, layers + 1):
            yield (level + 1,) * more + (level,) * (layers - more), ON_CARD
    if sizes.cuda and not sizes.config.tie_word_embeddings:
        yield (3,) * layers, Placement(embedding_on_host=True)
    if sizes.cuda and recipe.modules_to_save is None and recipe.streaming == "auto":
        yield from _layer_major_choices(recipe, sizes, (False, True))


def _layer_major_choices(
    recipe: Recipe, sizes: _Sizes, base_on_host: tuple[bool, ...]
) -> Iterator[tuple[tuple[int, ...], Placement]]:
    """Step by step less on the card, and fewer tokens at once."""
    # bitsandbytes' optimizers work on cards only.
    adapters = (False,) if recipe.optimizer.endswith("8bit") else (False, True)
    heads = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    if recipe.cutoff_len >= LONG_ROW:
        heads = max(1, heads * LONG_ROW // (2 * recipe.cutoff_len))
    for tokens in (8192, 4096, 2048, 1024):
        for on_host, adapters_on_host in itertools.product(base_on_host, adapters):
            yield (
                (3,) * sizes.layers,
                Placement(
                    layer_major=True,
                    embedding_on_host=not sizes.config.tie_word_embeddings,
                    base_on_host=on_host,
                    adapters_on_host=adapters_on_host,
                    tokens_at_once=min(tokens, sizes.step_tokens),
                    heads_at_once=heads,
                ),
            )


def _fixed_parts(sizes: _Sizes, placement: Placement, engine: bool) -> dict[str, int]:
    """What stands in memory all the time."""
    recipe, width = sizes.recipe, sizes.width
    embedding = _embedding(sizes) if placement.embedding_on_host else 0
    frozen, layers = sizes.frozen_bytes, sizes.layers
    parts = {
        "frozen weights": 2 * frozen // layers if placement.base_on_host else frozen,
        "embeddings, head and norms": int((sizes.others - embedding) * width),
    }
    if sizes.counted.experts:
        # Raw tensors, which bitsandbytes 0.50 leaves as they are: no NF4 for them.
        parts["experts (not quantized)"] = sizes.counted.experts * width
    if placement.adapters_on_host:
        # Two layers' values and gradients come and go.
        parts["adapters and gradients of two layers"] = 4 * 4 * sizes.adapter // layers
    else:
        parts |= _adapter_parts(sizes)
    if engine:
        copies = sizes.adapter // layers if placement.adapters_on_host else sizes.adapter
        parts["adapters (copy in the base's type)"] = copies * width
        if recipe.method == "qlora":
            parts["one layer dequantized"] = sizes.linear // layers * width
    if sizes.cuda:
        parts["CUDA context"] = CUDA_CONTEXT_BYTES
    return parts


def _adapter_parts(sizes: _Sizes) -> dict[str, int]:
    return {
        "adapters (float32)": sizes.adapter * 4,
        "gradients (float32)": sizes.adapter * 4,
        "optimizer state": int(sizes.adapter * OPTIMIZER_BYTES[sizes.recipe.optimizer]),
    }


def _host_parts(sizes: _Sizes, placement: Placement) -> dict[str, int]:
    """What lies in host memory instead of the card's."""
    parts = {}
    if placement.base_on_host:
        parts["frozen weights"] = sizes.frozen_bytes
    if placement.adapters_on_host:
        parts |= _adapter_parts(sizes)
    if placement.embedding_on_host:
        parts["embedding"] = _embedding(sizes) * sizes.width
    if placement.layer_major:
        parts["inputs of layers"] = (sizes.layers - placement.inputs_on_card) * sizes.inputs_bytes
    return parts


def _embedding(sizes: _Sizes) -> int:
    return int(sizes.config.vocab_size * sizes.config.hidden_size)


def _micro_tokens(sizes: _Sizes, placement: Placement) -> int:
    rows = max(1, placement.tokens_at_once // sizes.recipe.cutoff_len)
    return min(rows * sizes.recipe.cutoff_len, sizes.step_tokens)


def _under_way(sizes: _Sizes, placement: Placement) -> int:
    """Inputs of the micro-batch at work and of two that come (`layer_inputs.UNDER_WAY`)."""
    return 3 * _micro_tokens(sizes, placement) * int(sizes.config.hidden_size) * sizes.width


def _layer_major_parts(sizes: _Sizes, placement: Placement) -> dict[str, int]:
    """What a step needs that goes layer by layer through all its micro-batches."""
    model, qkv, out, inner = _widths(sizes)
    micro = _micro_tokens(sizes, placement)
    chunk = min(placement.tokens_at_once, micro)
    rank, width = sizes.recipe.lora_r, sizes.width
    keys = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    share = min(1.0, placement.heads_at_once / keys)
    # Throughout the way down: qkv, attention's output and its gradient, for all tokens.
    standing = (qkv + 2 * out + 3 * rank) * width
    # Then either the products of one chunk, or attention's gradients of one group of heads.
    products = (6 * inner + 2 * model + 3 * rank) * width
    attention = share * (2 * qkv * width + 4 * out)
    head = min(chunk * 4 * model * 4 + _logits_bytes(sizes, True), chunk * 64 * model)
    return {
        "hidden states of a step": sizes.inputs_bytes,
        # Those under way need room only once the kept ones are used up.
        "inputs of layers": max(
            _under_way(sizes, placement), placement.inputs_on_card * sizes.inputs_bytes
        ),
        "work of one layer, or the loss": int(
            max(micro * standing + max(chunk * products, micro * attention), head)
        ),
    }


def _working_parts(sizes: _Sizes, keep: tuple[int, ...], engine: bool) -> dict[str, int]:
    """What a micro-batch needs: activations kept, and one layer's work or the loss."""
    tokens = sizes.tokens
    logits = _logits_bytes(sizes, engine)
    if not engine:
        kept = tokens * _own_activation_bytes(sizes, bool(keep[0]))
        return {"activations (estimate)": int(kept), "logits of one chunk": logits}
    kept = tokens * sum(_kept_bytes(sizes, level) for level in keep)
    work = tokens * max(_work_bytes(sizes, level) for level in keep)
    return {
        "activations kept for backward": int(kept),
        "work of one layer, or the loss": int(max(work, logits)),
    }


def _widths(sizes: _Sizes) -> tuple[int, int, int, int]:
    """(model, q+k+v, attention output, inner) widths of one layer."""
    c = sizes.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = head * c.num_attention_heads
    keys = head * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    return c.hidden_size, queries + 2 * keys, queries, c.intermediate_size


def _kept_bytes(sizes: _Sizes, level: int) -> float:
    """Bytes one layer of the engine keeps for a token, by level; see `fast_layer.Keep`."""
    model, qkv, out, inner = _widths(sizes)
    rank = sizes.recipe.lora_r
    numbers = model + rank
    if level < 3:
        numbers += model + rank
    if level < 2:
        numbers += qkv + out + 3 * rank
    if level < 1:
        numbers += 2 * inner + 2 * rank
    scalars = 8 + (4 * sizes.config.num_attention_heads if level < 2 else 0)
    return numbers * sizes.width + scalars


def _work_bytes(sizes: _Sizes, level: int) -> float:
    """Bytes a token needs while one layer goes backward, beyond what was kept."""
    model, qkv, out, inner = _widths(sizes)
    numbers = 4 * model + 4 * inner  # dh, h and d(gate/up) beside residual gradients and norms
    if level >= 1:
        numbers += 2 * inner
    if level >= 2:
        numbers += qkv + out
    return numbers * sizes.width


def _own_activation_bytes(sizes: _Sizes, recompute: bool) -> float:
    """Bytes a model's own layers save for backward per token.

    Without recomputation a layer keeps, per target, its input after dropout and the mask, and per
    layer the norms' inputs and outputs, q, k, v, the attention output, gate and up. With it only
    the layer's input is kept, plus the working set of one layer.
    """
    layers, hidden, width = sizes.layers, sizes.config.hidden_size, sizes.width
    dropout = width + 1 if sizes.recipe.lora_dropout > 0 else 0
    inputs = sum(i for _, i, _ in targets(sizes.recipe, sizes.counted)) / layers
    outputs = sum(o for _, _, o in sizes.shapes) / layers
    per_layer = inputs * dropout + outputs * width + 6 * hidden * width
    if recompute:
        return layers * hidden * width + 1.5 * per_layer
    return layers * per_layer


def _logits_bytes(sizes: _Sizes, engine: bool) -> int:
    """Logits of one chunk; with a frozen plain head they become their own gradient."""
    from lorakit.ops.cross_entropy import LOGITS_BYTES

    float32 = min(LOGITS_BYTES, sizes.tokens * sizes.config.vocab_size * 4)
    if not engine:
        return float32 * 3
    hidden = 2 * sizes.tokens * sizes.config.hidden_size * sizes.width
    return float32 * sizes.width // 4 + hidden
