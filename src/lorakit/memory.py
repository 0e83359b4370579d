"""A recipe and a model's config enter; a MemoryPlan leaves: bytes per part, without any weights.

Shapes come from the model built on the meta device, so every architecture transformers knows is
counted exactly. Weights, adapters, gradients and optimizer are arithmetic; activations are an
estimate (per token and layer, below) and say so.
"""

from __future__ import annotations

from typing import Any

from lorakit.recipe import Recipe
from lorakit.records import Device, MemoryPlan

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
CUDA_CONTEXT_BYTES = 600 * 1024**2

Shape = tuple[str, int, int]


def plan_memory(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Predict the peak of a training run on `device`.

    Args:
        recipe: with `target_modules` and `gradient_checkpointing` resolved (`auto` counts as off).
        config: the transformers config of the base model.
        device: where it will run; its memory is what must suffice.
    """
    shapes = _linear_shapes(config)
    width = BYTES[device.dtype]
    linear = sum(i * o for _, i, o in shapes)
    other = _total_parameters(config) - linear
    weight_bytes = NF4_BYTES if recipe.method == "qlora" else width
    adapter = sum(recipe.lora_r * (i + o) for _, i, o in _targets(recipe, shapes))
    tokens = recipe.micro_batch_size * recipe.cutoff_len
    parts = {
        "frozen weights": int(linear * weight_bytes),
        "embeddings, head and norms": int(other * width),
        "adapters (float32)": adapter * 4,
        "gradients (float32)": adapter * 4,
        "optimizer state": int(adapter * OPTIMIZER_BYTES[recipe.optimizer]),
        "activations (estimate)": int(tokens * _activation_bytes(recipe, config, shapes, width)),
        "logits of one chunk": _logits_bytes(config, tokens),
    }
    if device.kind == "cuda":
        parts["CUDA context"] = CUDA_CONTEXT_BYTES
    total = sum(parts.values())
    return MemoryPlan(parts, device.memory_bytes, total < 0.95 * device.memory_bytes)


def _meta_model(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _total_parameters(config: Any) -> int:
    return sum(p.numel() for p in _meta_model(config).parameters())


def _linear_shapes(config: Any) -> list[Shape]:
    """(name, D_in, D_out) of every linear layer but the output head."""
    import torch

    model = _meta_model(config)
    head = model.get_output_embeddings()
    return [
        (name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def _targets(recipe: Recipe, shapes: list[Shape]) -> list[Shape]:
    wanted = recipe.target_modules
    if wanted in ("all-linear", "auto"):
        return shapes
    names = [wanted] if isinstance(wanted, str) else wanted
    return [s for s in shapes if s[0].split(".")[-1] in names or s[0] in names]


def _activation_bytes(recipe: Recipe, config: Any, shapes: list[Shape], width: int) -> float:
    """Bytes saved for backward per token.

    Without recomputation a layer keeps, per target, its input after dropout and the mask, and per
    layer the norms' inputs and outputs, q, k, v, the attention output, gate and up. With it only
    the layer's input is kept, plus the working set of one layer.
    """
    text = config.get_text_config()
    layers, hidden = text.num_hidden_layers, text.hidden_size
    dropout = width + 1 if recipe.lora_dropout > 0 else 0
    inputs = sum(i for _, i, _ in _targets(recipe, shapes)) / layers
    outputs = sum(o for _, _, o in shapes) / layers
    per_layer = inputs * dropout + outputs * width + 6 * hidden * width
    if recipe.gradient_checkpointing is True:
        return layers * hidden * width + 1.5 * per_layer
    return layers * per_layer


def _logits_bytes(config: Any, tokens: int) -> int:
    from lorakit.ops.cross_entropy import LOGITS_BYTES

    return min(LOGITS_BYTES, tokens * config.get_text_config().vocab_size * 4) * 3
