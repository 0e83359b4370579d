"""Compare the engine with the model's own layers and with plain torch before a run.

Two comparisons on 32 tokens: each layer's output with that of the model's own layer, which detects
an architecture that looks like Llama but computes something else; and one layer's gradients by
kernels with those in plain torch, which detects a GPU on which the kernels compute wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.engine.decoder_layer import ForwardContext
from lorakit.engine.lora_linear import refresh
from lorakit.model.eval_mode import evaluating
from lorakit.ops.backend import definitions_only, has_kernels
from lorakit.ops.dropout_mask import draw_keys

# Largest relative difference explained by rounding in the dtype, with a margin: of a layer's
# output, and of its gradients, which are about a dozen roundings away.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
PROBE_TOKENS = 32


def self_test(engine: Any, base: Any) -> tuple[str, str | None]:
    """Compare outputs and gradients; return (summary, reason for not using the engine or None)."""
    dtype = engine.layers[0].qkv.dtype
    try:
        difference = of_layers(engine, base)
        if not difference < TOLERANCE[dtype]:
            return "", f"the probe differs by {difference:.1%} from the model's own"
        summary = f"probe differs by {difference:.2%} from the model's own"
        if engine.host_adapters is not None or not has_kernels(engine.layers[0].qkv.a):
            return summary, None
        difference = of_gradients(engine, base)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from a compiler or a driver: its type is unknown
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        return "", f"the kernels do not run on this GPU ({type(error).__name__}: {reason})"
    if not difference < GRADIENT_TOLERANCE[dtype]:
        return "", f"the kernels' gradients differ by {difference:.1%} from plain torch's"
    return f"{summary}, gradients by {difference:.2%} from plain torch", None


def of_layers(engine: Any, base: Any) -> float:
    """Largest relative difference |ours - own| / |own - input| of a layer, each on equal inputs.

    Layers are compared one by one: over the full depth even two bf16 runs of one model differ by
    percents.
    """
    if engine.host_adapters is None:
        refresh(engine.groups, training=False)
    with evaluating(base):
        hidden, call, positions = _begin(engine, base)
        differences = [torch.zeros((), device=engine.device)]
        for index, (fast, layer) in enumerate(
            zip(engine.layers, engine.decoder.layers, strict=True)
        ):
            own = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=call.angles,
                use_cache=False,
            )
            own = own[0] if isinstance(own, tuple) else own
            engine.load_layer(index, training=False)
            error = (fast(hidden, call) - own).float().norm()
            differences.append(error / (own - hidden).float().norm())
            hidden = own
        return float(torch.stack(differences).max())


def of_gradients(engine: Any, base: Any) -> float:
    """Largest |kernels - plain torch| / |plain torch| of one layer's gradients, in training.

    The layer is the first one with adapters. B starts at 0, where most gradients of an adapter are
    also 0, so it is random here, in the copies that every step refreshes.
    """
    layer = next((x for x in engine.layers if x.masks), engine.layers[0])
    with evaluating(base):
        hidden, call, _ = _begin(engine, base)
    engine.load_layer(layer.number, training=True)
    refresh(layer.groups, training=True)
    gpus = [torch.cuda.current_device()] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(0)
        for group in layer.groups:
            if group.adapted:
                group.b.normal_(std=group.rank**-0.5)
        keys = draw_keys(layer.masks, engine.device).expand(len(engine.layers), -1, -1)
        weight = torch.randn_like(hidden)
    call = ForwardContext(call.angles, None, keys if layer.masks else None, training=True)
    by_kernels = _gradients(layer, call, hidden, weight)
    with definitions_only():
        expected = _gradients(layer, call, hidden, weight)
    differences = [(a - b).norm() / b.norm() for a, b in zip(by_kernels, expected, strict=True)]
    return float(torch.stack(differences).max())


def _begin(engine: Any, base: Any) -> tuple[Tensor, ForwardContext, Tensor]:
    """(embedded tokens [1, T, D], context of all layers, positions [1, T])."""
    positions = torch.arange(PROBE_TOKENS, device=engine.device).unsqueeze(0)
    ids = (positions * 7919 + 13) % base.config.get_text_config().vocab_size
    return *engine.embed_and_context({"input_ids": ids, "position_ids": positions}, None), positions


def _gradients(layer: Any, call: ForwardContext, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of the input and of every factor, in float32."""
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(x, call)
        parameters = [p for group in layer.groups for p in group.parameters]
        grads = torch.autograd.grad(out, [x, *parameters], weight)
    return [g.float() for g in grads]
