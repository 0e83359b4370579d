"""Build a base model with random weights, without a download.

Layers are made and (for QLoRA) quantized one at a time, so a GPU needs memory for the finished
model and one 16-bit layer, not for two models.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from lorakit.model.base_class import (
    auto_class,
    empty_base,
    frozen_config,
    is_inside,
    kept_in_16_bits,
    name_of,
)
from lorakit.model.grouped_experts import quantize_all
from lorakit.model.kernel_check import check_kernels
from lorakit.model.kernel_functions import kernel_functions
from lorakit.model.layer_widths import decoder_layers
from lorakit.types import Device


def random_model(config: Any, device: Device, four_bit: bool, on_host: bool = False) -> Any:
    """Build the base of this config with random weights in the device's dtype.

    Args:
        four_bit: quantize linear layers and experts to NF4.
        on_host: make the layers on the device one by one and keep them in host memory.
    """
    import torch

    dtype = getattr(torch, device.dtype)
    empty = empty_base(config)
    kept = kept_in_16_bits(empty)
    with torch.device(device.kind), _on_meta({type(layer) for layer in decoder_layers(empty)}):
        model = auto_class(config).from_config(frozen_config(config), dtype=dtype)
    layers = decoder_layers(model)
    path = name_of(model, layers)
    for index, layer in enumerate(layers):
        # A float32 layer first would fragment the GPU's memory.
        layer = layer.to(dtype).to_empty(device=device.kind)
        _randomize(layer)
        if four_bit:
            layer = _quantize(layer, device, f"{path}.{index}", kept)
            quantize_all(layer, dtype)
        layers[index] = layer.cpu() if on_host else layer
    if four_bit:
        _quantize(model, device, "", kept)  # projections outside of the layers, as Gemma 4's
    model.is_loaded_in_4bit = four_bit
    kernel_functions(model)
    if device.kind != "cpu":
        check_kernels(model)
    return model


@contextlib.contextmanager
def _on_meta(kinds: set[type[Any]]) -> Iterator[None]:
    """Make modules of these classes on the meta device, whatever the device of the others."""
    import torch

    def made(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def without_memory(*args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                init(*args, **kwargs)

        return without_memory

    own = {kind: kind.__init__ for kind in kinds}
    try:
        for kind, init in own.items():
            kind.__init__ = made(init)
        yield
    finally:
        for kind, init in own.items():
            kind.__init__ = init


def _randomize(layer: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        for buffer in layer.buffers():  # scales, as Gemma 4's of a layer
            buffer.fill_(1)


def _quantize(layer: Any, device: Device, path: str, kept: set[str]) -> Any:
    """Replace the linear modules of `layer` by NF4 ones with double quantization, but `kept`."""
    import bitsandbytes as bnb
    import torch

    from lorakit.model.load import guard_quantized_cpu_weights

    for inside, parent in list(layer.named_modules(prefix=path)):
        for name, child in list(parent.named_children()):
            full_name = f"{inside}.{name}".removeprefix(".")
            if not isinstance(child, torch.nn.Linear) or is_inside(full_name, kept):
                continue
            if isinstance(child, bnb.nn.Linear4bit):
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
