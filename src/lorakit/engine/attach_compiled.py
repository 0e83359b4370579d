"""Compile the decoder layers of a PEFT model, and compare them with the model's own.

Each layer computes a probe twice from equal inputs and dropout masks: as it is, and compiled, by
the code that training will run. Outputs and gradients, those of the adapters included, have to
agree within rounding. The probe is longer than the model's attention windows, so that a window that
is ignored shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.engine.compiled_layers import CompiledLayers, shared_inputs
from lorakit.engine.lora_linear import Unsupported, refresh
from lorakit.engine.self_test import GRADIENT_TOLERANCE, TOLERANCE
from lorakit.errors import first_line
from lorakit.model.base_class import text_decoder
from lorakit.model.eval_mode import evaluating
from lorakit.model.grouped_experts import GroupedExperts
from lorakit.ops.dropout_mask import draw_keys, keep_mask

PROBE_TOKENS = 72
# Longer windows are not probed: the probe's plain attention holds all pairs of tokens.
LONGEST_WINDOW = 4096


def attach_compiled(base: Any, backend: str = "inductor") -> tuple[CompiledLayers | None, str]:
    """Compile the layers of the transformers model inside a PEFT model, and verify them.

    Layers that ask for attention that our kernels do not compute (softcap, sinks) keep
    transformers' attention function.

    Returns:
        (compiled layers, or None; description of the path with the reason).
    """
    reason, probe = "", probe_inputs(base)
    decoder = text_decoder(base)
    try:
        with evaluating(base):
            sharing = shared_inputs(decoder, lambda: decoder(**probe, use_cache=False))
    except Unsupported as error:
        return None, f"{error}: PEFT's own layers"
    for own_attention in (False, True):
        compiled = None
        try:
            compiled = CompiledLayers(base, sharing, own_attention, backend)
            states, gradients = differences(compiled, probe)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # from the compiler or the model's code: its type is unknown
            reason = f"cannot be compiled ({type(error).__name__}: {first_line(error)[:150]})"
        else:
            dtype = base.dtype
            if states < TOLERANCE[dtype] and gradients < GRADIENT_TOLERANCE[dtype]:
                attention = ", attention of transformers" if own_attention else ""
                return compiled, (
                    f"{len(compiled.layers)} compiled layers{attention}; probe differs by "
                    f"{states:.2%} from the model's own, gradients by {gradients:.2%}"
                )
            reason = (
                f"compiled layers differ by {states:.1%}, gradients by {gradients:.1%}"
                " from the model's own"
            )
        if compiled is not None:
            compiled.detach()
    return None, f"{reason}: PEFT's own layers"


def probe_inputs(base: Any) -> dict[str, Tensor]:
    """Ids [1, T] that are longer than the model's attention windows."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    tokens = PROBE_TOKENS + (window if window <= LONGEST_WINDOW else 0)
    place = torch.arange(tokens, device=base.device)
    return {"input_ids": ((place * 7919 + 13) % (config.vocab_size - 1) + 1).unsqueeze(0)}


def differences(compiled: CompiledLayers, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Largest relative differences of a layer's output and of its gradients.

    An output's difference is relative to what the layer adds to its input.
    """
    calls = _own_calls(compiled, inputs)
    of_states, of_gradients = [], []
    with _random_factors(compiled), _equal_masks(compiled), _training(compiled.base):
        refresh(compiled.groups, training=True)
        for layer, (args, kwargs) in zip(compiled.layers, calls, strict=True):
            with _equal_routing(layer) as again:
                own, expected = _gradients(layer, args, kwargs)
                again()
                if not compiled.own_attention:
                    kwargs = {**kwargs, "attention_mask": None}
                with compiled.active():
                    states, found = _gradients(layer, args, kwargs)
            of_states.append((states - own).float().norm() / (own - args[0]).float().norm())
            pairs = zip(found, expected, strict=True)
            of_gradients += [(f - e).float().norm() / e.float().norm() for f, e in pairs]
    # torch's maximum is NaN if one of them is.
    return float(torch.stack(of_states).max()), float(torch.stack(of_gradients).max())


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _own_calls(compiled: CompiledLayers, inputs: dict[str, Tensor]) -> list[Call]:
    """The arguments of each layer in a pass of the model as it is."""
    calls: list[Call] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in compiled.layers]
    try:
        with evaluating(compiled.base):
            compiled.decoder(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if any(not args for args, _ in calls):
        raise Unsupported("its layers take their input by name")
    return calls


def _gradients(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """A layer's output, and the gradients of a random sum of it by input and adapters."""
    x = args[0].detach().requires_grad_()
    with torch.enable_grad():
        out = layer(x, *args[1:], **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        generator = torch.Generator(device=out.device).manual_seed(0)
        weight = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out, [x, *parameters], weight, allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


@contextlib.contextmanager
def _random_factors(compiled: CompiledLayers) -> Iterator[None]:
    """Fill each B with random numbers, and restore it: with B = 0 A has no gradient."""
    factors = [
        p for layer in compiled.layers for n, p in layer.named_parameters() if ".lora_B." in n
    ]
    before = [p.data.clone() for p in factors]
    generator = torch.Generator().manual_seed(0)
    for p in factors:
        values = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
        p.data.copy_(values.to(p.device, p.dtype))
    try:
        yield
    finally:
        for p, values in zip(factors, before, strict=True):
            p.data.copy_(values)


@contextlib.contextmanager
def _training(base: Any) -> Iterator[None]:
    """The mode and dtype of a training pass."""
    training, half = base.training, base.dtype in (torch.bfloat16, torch.float16)
    base.train()
    try:
        with torch.autocast(base.device.type, base.dtype) if half else contextlib.nullcontext():
            yield
    finally:
        base.train(training)


@contextlib.contextmanager
def _equal_masks(compiled: CompiledLayers) -> Iterator[None]:
    """Give PEFT's dropout the masks that the compiled layers draw from their keys."""
    replaced: list[Any] = []
    if len(compiled.keys):
        compiled.keys.copy_(draw_keys(len(compiled.keys), compiled.keys.device))
    for group in compiled.linear:
        slots = dict(zip(group.fused.slots, group.modules, strict=True))
        for slot, key in enumerate(group.keys if group.keys is not None else ()):
            dropouts = slots[slot].lora_dropout
            replaced.append((dropouts, dropouts["default"]))
            dropouts["default"] = _KeyedDropout(key, group.fused.p)
    try:
        yield
    finally:
        for dropouts, own in replaced:
            dropouts["default"] = own


@contextlib.contextmanager
def _equal_routing(layer: Any) -> Iterator[Callable[[], None]]:
    """Let the next calls choose the first one's experts, and its masks after each `again()`."""
    experts = [module for module in layer.modules() if isinstance(module, GroupedExperts)]
    device = next(layer.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = torch.get_rng_state()
        on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def again() -> None:
            torch.set_rng_state(state)
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, device)

        for module in experts:
            module.routing = {}
        try:
            yield again
        finally:
            for module in experts:
                module.routing = None


class _KeyedDropout(nn.Module):
    def __init__(self, key: Tensor, p: float) -> None:
        super().__init__()
        self.key, self.p = key, p

    def forward(self, x: Tensor) -> Tensor:
        keep = keep_mask(self.key, x.shape[:-1].numel(), x.shape[-1], self.p)
        return x * keep.view(x.shape) / (1 - self.p)
