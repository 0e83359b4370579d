"""An engine enters, on its model and card; how far it is from what it stands for leaves.

Two comparisons, on 32 tokens: each layer's output with that of the model's own layer, so that an
architecture that looks like Llama and computes something else is found out; and one layer's
gradients by kernels with those in plain torch, so that a card on which they go wrong is.
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

# Largest relative difference that rounding in the type explains, with room: of a layer's output,
# and of its gradients, which a dozen roundings lie between.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
PROBE_TOKENS = 32


def self_test(engine: Any, base: Any) -> tuple[str, str | None]:
    """(what was found, why the engine does not serve or None)."""
    kind = engine.layers[0].qkv.kind
    try:
        apart = of_layers(engine, base)
        if not apart < TOLERANCE[kind]:
            return "", f"the probe differs by {apart:.1%} from the model's own"
        found = f"probe differs by {apart:.2%} from the model's own"
        if engine.host_adapters is not None or not has_kernels(engine.layers[0].qkv.a):
            return found, None
        apart = of_gradients(engine, base)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a driver's: nothing of it is ours to name
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        return "", f"the kernels do not run on this card ({type(error).__name__}: {said})"
    if not apart < GRADIENT_TOLERANCE[kind]:
        return "", f"the kernels' gradients differ by {apart:.1%} from plain torch's"
    return f"{found}, gradients by {apart:.2%} from plain torch", None


def of_layers(engine: Any, base: Any) -> float:
    """Largest relative difference |ours - own| / |own - input| of one layer, each on equal inputs.

    Layer by layer: over the whole depth even two bf16 runs of one model drift apart by percents.
    """
    if engine.host_adapters is None:
        refresh(engine.groups, training=False)
    with evaluating(base):
        hidden, call, places = _begin(engine, base)
        differences = [torch.zeros((), device=engine.device)]
        for number, (fast, layer) in enumerate(
            zip(engine.layers, engine.decoder.layers, strict=True)
        ):
            own = layer(
                hidden,
                attention_mask=None,
                position_ids=places,
                position_embeddings=call.angles,
                use_cache=False,
            )
            own = own[0] if isinstance(own, tuple) else own
            engine.enter(number, training=False)
            error = (fast(hidden, call) - own).float().norm()
            differences.append(error / (own - hidden).float().norm())
            hidden = own
        return float(torch.stack(differences).max())


def of_gradients(engine: Any, base: Any) -> float:
    """Largest |kernels - plain torch| / |plain torch| of one layer's gradients, in training.

    The first layer with adapters. B starts at 0, where most gradients of an adapter are 0 too: it
    is random here, in the copies that every step fills anew.
    """
    layer = next((x for x in engine.layers if x.masks), engine.layers[0])
    with evaluating(base):
        hidden, call, _ = _begin(engine, base)
    engine.enter(layer.number, training=True)
    refresh(layer.groups, training=True)
    cards = [torch.cuda.current_device()] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.manual_seed(0)
        for group in layer.groups:
            if group.adapted:
                group.b.normal_(std=group.rank**-0.5)
        keys = draw_keys(layer.masks, engine.device).expand(len(engine.layers), -1, -1)
        weight = torch.randn_like(hidden)
    call = ForwardContext(call.angles, None, keys if layer.masks else None, training=True)
    found = _gradients(layer, call, hidden, weight)
    with definitions_only():
        expected = _gradients(layer, call, hidden, weight)
    apart = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(apart).max())


def _begin(engine: Any, base: Any) -> tuple[Tensor, ForwardContext, Tensor]:
    """Embedded tokens [1, T, D], what layers share, and positions [1, T]."""
    places = torch.arange(PROBE_TOKENS, device=engine.device).unsqueeze(0)
    ids = (places * 7919 + 13) % base.config.get_text_config().vocab_size
    return *engine.begin({"input_ids": ids, "position_ids": places}, None), places


def _gradients(layer: Any, call: ForwardContext, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Of the input and of every factor, in float32."""
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(x, call)
        parameters = [p for group in layer.groups for p in group.parameters]
        found = torch.autograd.grad(out, [x, *parameters], weight)
    return [g.float() for g in found]
