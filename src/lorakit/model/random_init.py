"""Build a base model with random weights, without a download.

Layers are made and (for QLoRA) quantized one at a time, so a GPU needs memory for the finished
model and one 16-bit layer, not for two models.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import RecipeError
from lorakit.model.base_class import frozen_config
from lorakit.model.kernel_check import check_kernels
from lorakit.model.kernel_functions import kernel_functions
from lorakit.types import Device


def random_model(config: Any, device: Device, four_bit: bool, on_host: bool = False) -> Any:
    """Build a causal LM of this config with random weights in the device's dtype.

    Args:
        four_bit: quantize linear layers to NF4.
        on_host: make the layers on the device one by one and keep them in host memory.

    Raises:
        RecipeError: the layers depend on each other, so none can be made alone.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, device.dtype)
    first = frozen_config(config)
    first.num_hidden_layers = 1
    try:
        with torch.device(device.kind):
            model = AutoModelForCausalLM.from_config(first, dtype=dtype)
    except IndexError as error:  # Gemma 4's layers share keys and values
        raise RecipeError(
            f"layers of {config.model_type} cannot be made one at a time, so there is no bench",
            hint="`lorakit plan` estimates the speed of this shape",
        ) from error
    layer_type = type(model.model.layers[0])
    model.model.layers = nn.ModuleList()
    for index in range(config.num_hidden_layers):
        # Made on "meta": a float32 layer first would fragment the GPU's memory.
        with torch.device("meta"):
            layer = layer_type(model.config, index).to(dtype)
        layer.to_empty(device=device.kind)
        _randomize(layer)
        layer = _quantize(layer, device) if four_bit else layer
        model.model.layers.append(layer.cpu() if on_host else layer)
    model.config.num_hidden_layers = config.num_hidden_layers
    model.is_loaded_in_4bit = four_bit
    kernel_functions(model)
    if device.kind != "cpu":
        check_kernels(model)
    return model


def _randomize(layer: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


def _quantize(layer: Any, device: Device) -> Any:
    """Replace each linear module of `layer` by an NF4 one with double quantization."""
    import bitsandbytes as bnb
    import torch

    from lorakit.model.load import guard_quantized_cpu_weights

    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            quantized = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight = bnb.nn.Params4bit(
                child.weight.data,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=quantized,
            )
            quantized.weight = weight.to(device.kind)
            quantized.bias = child.bias
            setattr(parent, name, quantized)
    guard_quantized_cpu_weights(layer)
    return layer
