"""Run a model's own decoder layers as compiled regions in training.

For families without hand-written gradients. torch.compile fuses what transformers' layers do
between their products (norms, rotations, gates) and chooses which activations to save; attention
and the linear layers with their adapters are operators that it does not look into
(`engine/compiled_attention.py`, `ops/lora_linear.py`).

Only training passes are compiled: generation, evaluation and probes run the layers as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.engine.compiled_attention import attention_of, register
from lorakit.model.base_class import text_decoder
from lorakit.model.kernel_functions import kernel_functions
from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.lora_linear import four_bit_parts, lora_linear

# Kinds of layers in a model times kinds of batches; torch stops at 8.
RECOMPILE_LIMIT = 64


class CompiledLayers:
    """The compiled layers of one model, and the state that they share in a pass.

    Args:
        own_attention: keep the attention function of transformers in training, too.
        backend: of torch.compile; "eager" and "aot_eager" are for tests.
    """

    def __init__(self, base: Any, own_attention: bool = False, backend: str = "inductor") -> None:
        self.base, self.decoder = base, text_decoder(base)
        self.config, self.own_attention = self.decoder.config, own_attention
        self.recompute = False
        kernel_functions(base)  # puts our operations in place of loops in torch
        self.layers: list[Any] = list(self.decoder.layers)
        # Linear layers, their own classes, and classes whose forward is an operator.
        self.linear = _linear_layers(self.layers)
        self.own = [(module, type(module)) for module, _ in self.linear]
        dropped = [module for module, _ in self.linear if module.dropout_p > 0]
        device = next(self.decoder.parameters()).device
        # Static addresses: the keys of each pass are written here, and CUDA graphs read them.
        self.keys = torch.zeros(len(dropped), 2, dtype=torch.int32, device=device)
        for row, module in enumerate(dropped):
            module.dropout_keys = self.keys[row : row + 1]
        for tensor in (t for m, _ in self.linear for t in (*m.four_bit, m.dropout_keys)):
            if tensor is not None:
                torch._dynamo.mark_static(tensor)  # parameters are static, other tensors not
        self.run = _compiled(backend)
        self.attention = self.config._attn_implementation if own_attention else register(device)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """Hidden states [B, T, D] of a training pass: rows padded on the right, or packed.

        Args:
            inputs: of the decoder, without cache. A mask is left out: no token attends to padding
                on its right, and padding has no loss.
        """
        if len(self.keys):
            self.keys.copy_(draw_keys(len(self.keys), self.keys.device))
        given = {k: v for k, v in inputs.items() if k not in ("attention_mask", "use_cache")}
        with self.active():
            states: Tensor = self.decoder(**given, use_cache=False)[0]
        return states

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make calls of the layers compiled ones."""
        with attention_of(self.config, self.attention):
            try:
                _set_classes(self.linear)
                for layer in self.layers:
                    layer._compiled_call_impl = functools.partial(self._layer, layer)
                yield
            finally:
                for layer in self.layers:
                    layer._compiled_call_impl = None
                _set_classes(self.own)

    @property
    def supported(self) -> bool:
        """True if the adapters are on, as they were when the layers were compiled."""
        return not any(
            module.merged or module.disable_adapters or module.active_adapters != ["default"]
            for module, _ in self.linear
            if hasattr(module, "lora_A")
        )

    def _layer(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not args[0].requires_grad:
            # The first layer's input: without a gradient it would be compiled apart, for 10 s.
            args = (args[0].detach().requires_grad_(), *args[1:])
        if not self.recompute:
            return self.run(layer, *args, **kwargs)
        return checkpoint(
            functools.partial(self.run, layer, **kwargs),
            *args,
            use_reentrant=False,
            # Masks come from keys that stay until the next micro-batch.
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), self.active()),
        )

    def detach(self) -> None:
        """Remove what was added to the linear layers."""
        for module, _ in self.linear:
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)


def _set_classes(modules: Sequence[tuple[Any, type]]) -> None:
    for module, kind in modules:
        module.__class__ = kind


def _compiled(backend: str) -> Callable[..., Any]:
    """A function that calls a layer; layers of one kind share its compiled code."""
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )

    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    return torch.compile(run, fullgraph=True, backend=backend, dynamic=True)


# Attributes of a replaced linear layer.
_ATTRIBUTES = (
    "four_bit", "dense_shape", "block_sizes", "dropout_p", "dropout_keys", "lora_scale",
    "frozen_dtype",
)  # fmt: skip


class _LoraForward:
    """`forward` of a LoRA layer with one adapter, as one operator; mixed into PEFT's class."""

    def forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        kind = x.dtype
        y = lora_linear(
            x.to(self.frozen_dtype),
            None if self.four_bit else self.base_layer.weight,
            self.four_bit,
            *self.dense_shape,
            *self.block_sizes,
            self.base_layer.bias,
            self.lora_A["default"].weight,
            self.lora_B["default"].weight,
            self.dropout_keys if self.training else None,
            self.dropout_p,
            self.lora_scale,
        )
        return y.to(kind)


class _FourBitForward:
    """`forward` of a 4-bit layer without an adapter."""

    def forward(self: Any, x: Tensor) -> Tensor:
        kind = x.dtype
        y = lora_linear(
            x.to(self.frozen_dtype),
            None,
            self.four_bit,
            *self.dense_shape,
            *self.block_sizes,
            self.bias,
        )
        return y.to(kind)


def _linear_layers(layers: Sequence[nn.Module]) -> list[tuple[Any, type]]:
    """Linear layers that an operator can compute, with the class that calls it."""
    found: list[tuple[Any, type]] = []
    inside = {id(m.base_layer) for layer in layers for m in layer.modules() if _is_lora(m)}
    for module in (m for layer in layers for m in layer.modules()):
        if _is_lora(module) and _is_plain(module):
            _set_attributes(module, module.base_layer)
            found.append((module, _with(_LoraForward, type(module))))
        elif type(module).__name__ == "Linear4bit" and id(module) not in inside:
            _set_attributes(module, module)
            found.append((module, _with(_FourBitForward, type(module))))
    return found


@functools.cache
def _with(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _set_attributes(module: Any, base: Any) -> None:
    four_bit = type(base).__name__ == "Linear4bit"
    module.dense_shape = (base.out_features, base.in_features)
    module.frozen_dtype = base.compute_dtype if four_bit else base.weight.dtype
    module.four_bit = four_bit_parts(base.weight) if four_bit else []
    module.block_sizes = (0, 0)
    if four_bit:
        state = base.weight.quant_state
        module.block_sizes = (state.blocksize, state.state2.blocksize if state.nested else 0)
    lora = hasattr(module, "lora_A")
    dropout = module.lora_dropout["default"] if lora else None
    module.dropout_p = float(getattr(dropout, "p", 0.0))
    module.dropout_keys = None
    module.lora_scale = float(module.scaling["default"]) if lora else 1.0


def _is_lora(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _is_plain(module: Any) -> bool:
    """True if the layer is a linear one with a single, plain LoRA adapter."""
    base = module.base_layer
    return (
        type(base).__name__ in ("Linear", "Linear4bit")
        and list(module.lora_A) == ["default"]
        and list(module.active_adapters) == ["default"]
        and not module.merged
        and module.lora_variant.get("default") is None
        and not module.lora_bias.get("default")
        and not module.lora_embedding_A
        and not module.fan_in_fan_out
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and (type(base).__name__ == "Linear" or base.weight.quant_state is not None)
    )
