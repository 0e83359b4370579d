"""Build the engine for the decoder layers of a PEFT model, and verify it.

Only this instance changes: its modules, parameters and their names stay, so PEFT saves adapters as
usual. Calls that the engine does not support (generation with a cache, adapters switched off or
merged) go through the model's own layers.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.data.batching import Batch
from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.engine.adapter_offload import HostAdapters
from lorakit.engine.attention import Segments
from lorakit.engine.decoder_layer import (
    ActivationBuffers,
    FastLayer,
    ForwardContext,
    SavedActivations,
)
from lorakit.engine.lora_linear import Scratch, Unsupported, refresh
from lorakit.engine.self_test import self_test
from lorakit.engine.weight_streaming import StreamedBase
from lorakit.model.architectures import FAST_FAMILIES
from lorakit.model.base_class import text_decoder
from lorakit.ops.backend import has_kernels, kernels_reason
from lorakit.ops.dropout_mask import draw_keys
from lorakit.types import ON_GPU, Placement


@dataclass
class Engine:
    """The engine of one model: its fused layers, and the decoder around them."""

    decoder: Any
    layers: list[FastLayer]
    device: torch.device
    scratch: Scratch = field(default_factory=dict)
    streamed: StreamedBase | None = None
    host_adapters: HostAdapters | None = None
    embedding_on_host: bool = False
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        # PEFT switches all adapters at once, but any module may be the only adapted kind.
        self.adapted = [m for m in self.decoder.modules() if hasattr(m, "lora_A")]

    @property
    def groups(self) -> list[Any]:
        return [group for layer in self.layers for group in layer.groups]

    def set_checkpointing(self, levels: list[SavedActivations]) -> None:
        """Set the activations that each layer saves for backward."""
        for layer, level in zip(self.layers, levels, strict=True):
            layer.keep = level

    def supports(self, length: int) -> bool:
        """True if the engine computes the same as the model: adapters on, within the window."""
        windows = [layer.attention.window for layer in self.layers]
        if any(window and length > window for window in windows):
            return False
        return not any(_switched_off(module) for module in self.adapted)

    def move_embedding_to_host(self) -> None:
        """Save GPU memory: look up embedding rows on the host for each batch."""
        if not self.embedding_on_host:
            self.embedding_on_host = True
            embedding = self.decoder.embed_tokens.cpu()
            before = embedding.register_forward_pre_hook(lambda _, inputs: (inputs[0].cpu(),))
            after = embedding.register_forward_hook(lambda _, __, output: output.to(self.device))
            # `generate` sends ids and positions to the device of the first parameter: the host.
            moved = self.decoder.register_forward_pre_hook(self._inputs_to_device, with_kwargs=True)
            self.hooks += [before, after, moved]

    def _inputs_to_device(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def moved(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def embed_on_host(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids on the host, in pinned memory if the device is a GPU."""
        embedded: Tensor = self.decoder.embed_tokens.forward(input_ids)  # past the hooks
        return embedded.pin_memory() if self.device.type == "cuda" else embedded

    def to_device(self, micro: Batch) -> Batch:
        """Copy a micro-batch to the device; embed it first if the embedding is on the host."""
        if self.embedding_on_host and "inputs_embeds" not in micro:
            micro = {**micro, "inputs_embeds": self.embed_on_host(micro["input_ids"])}
        if "inputs_embeds" in micro:
            micro = {k: v for k, v in micro.items() if k != "input_ids"}
        return to_device(micro, self.device)

    def stream_base(self, spread: DistributedContext | None = None) -> None:
        """Move frozen weights to host memory or shard them; copy layers to the GPU in turn."""
        groups = [layer.groups for layer in self.layers]
        self.streamed = StreamedBase(groups, self.device, spread)
        for index, layer in enumerate(self.decoder.layers):
            hook = functools.partial(self._before_own_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(hook))

    def move_adapters_to_host(self) -> None:
        """Move adapters to host memory, with their gradients and optimizer state."""
        self.host_adapters = HostAdapters([layer.groups for layer in self.layers], self.device)

    def load_layer(self, number: int, training: bool, following: int | None = None) -> None:
        """Make layer `number` ready for work queued from here on, and prefetch `following`."""
        if self.streamed is not None:
            self.streamed.load_layer(number, following)
        if self.host_adapters is not None:
            self.host_adapters.load_layer(number, following)
            refresh(self.layers[number].groups, training)

    def embed_and_context(
        self, inputs: dict[str, Any], segments: Segments | None
    ) -> tuple[Tensor, ForwardContext]:
        """Embed one micro-batch and build the context that all layers share.

        Args:
            inputs: `input_ids` or `inputs_embeds`, and optionally `position_ids`.

        Returns:
            (embedded ids [B, T, D], context).
        """
        training = self.decoder.training
        hidden = inputs.get("inputs_embeds")
        if hidden is None:
            hidden = self.decoder.embed_tokens(inputs["input_ids"])
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        angles = self.decoder.rotary_emb(hidden, position_ids=positions)
        masks = max((layer.masks for layer in self.layers), default=0)
        keys = None
        if training and masks:
            keys = draw_keys(len(self.layers) * masks, hidden.device)
            keys = keys.view(len(self.layers), masks, 2)
        return hidden, ForwardContext(angles, segments, keys, training)

    def __call__(self, inputs: dict[str, Any], segments: Segments | None) -> Tensor:
        """Hidden states [B, T, D] after the last norm, for right-padded rows or one packed row."""
        hidden, call = self.embed_and_context(inputs, segments)
        if self.host_adapters is None:
            refresh(self.groups, call.training)
        if torch.is_grad_enabled():
            rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
            call = replace(call, arena=ActivationBuffers(self.layers, rows, width, hidden))
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            self.load_layer(index, call.training, None if last else index + 1)
            hidden = layer(hidden, call)
        return self.decoder.norm(hidden)

    def detach(self) -> None:
        """Give every module a separate weight again, as savers expect.

        A streamed base and an embedding on the host stay there with their hooks: they do not fit on
        the GPU, and evaluation takes more than a step (384 MiB too much within 7 GiB).
        """
        if self.host_adapters is not None:
            self.host_adapters.leave()
            self.host_adapters = None
        for group in self.groups:
            group.a_grad_buffer = group.b_grad_buffer = None
        if self.device.type == "cuda":
            # Gradient buffers kept the CUDA graphs' memory pool: 430 MiB at 12 layers of 7B.
            torch.cuda.empty_cache()
        if self.streamed is None:
            for group in self.groups:
                group.unmerge()

    def _before_own_layer(self, index: int, *_: Any) -> None:
        """Load layer `index` before the model's own layer runs (generation, probes)."""
        if self.streamed is not None:
            self.streamed.load_layer(index, (index + 1) % len(self.layers))
        if self.host_adapters is not None:
            self.host_adapters.load_layer(index)


def to_device(micro: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a micro-batch to the device, without waiting."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in micro.items()
    }


def unfused_reason(fused_layers: str, device: torch.device) -> str | None:
    """The reason why `fused_layers` keeps the model's own layers on this device; None if fused.

    Args:
        fused_layers: "auto" fuses on GPUs with kernels, "on" on every device, "off" never.
    """
    if fused_layers == "off":
        return "the model's own layers (fused_layers: off)"
    if fused_layers == "auto" and not has_kernels(torch.empty(0, device=device)):
        # On a CPU the engine took 0.92 s per demo step, PEFT's own layers 0.84.
        return f"the model's own layers: {kernels_reason(device.type)} is no faster fused"
    return None


def attach_engine(
    base: Any,
    device: torch.device,
    placement: Placement = ON_GPU,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> tuple[Engine | None, str]:
    """Build the engine for the transformers model inside a PEFT model, and verify it.

    The engine's hidden states are compared with the model's own on a probe, so an architecture that
    looks like Llama but computes something else is rejected.

    Returns:
        (engine or None if unsupported, description of the path with the reason).
    """
    config = base.config.get_text_config()
    if config.model_type not in FAST_FAMILIES:
        return None, f"model family {config.model_type}: no fast path"
    decoder = text_decoder(base)
    scratch: Scratch = {}
    try:
        _check_shape(decoder, config)
        numbered = enumerate(decoder.layers)
        layers = [FastLayer(x, i, config, scratch, device) for i, x in numbered]
    except (Unsupported, AttributeError) as error:
        return None, f"{error}: PEFT's own layers"
    engine = Engine(decoder, layers, device, scratch)
    for layer in layers:
        for group in layer.groups:
            group.merge()
        if device.type == "cuda":
            # Return the parts at once; cached, their blocks would be split by small tensors.
            torch.cuda.empty_cache()
    _place(engine, base, placement, ranks)
    comparison, fault = self_test(engine, base)
    if fault:
        engine.detach()
        return None, f"{fault}: its own layers"
    return engine, f"{len(layers)} fused layers, {kernels_reason(device.type)}; {comparison}"


def _place(engine: Engine, base: Any, placement: Placement, ranks: DistributedContext) -> None:
    """Move parts to where the plan places them; parts outside the layers go to the GPU."""
    if placement.base_offloaded:
        engine.stream_base(None if placement.base_on_host else ranks)
        if not placement.base_on_host:
            ranks.release_load_turn()
        layer_norms = [(*layer.norms, *layer.attention.norms) for layer in engine.layers]
        modules = [engine.decoder.norm, engine.decoder.rotary_emb, *itertools.chain(*layer_norms)]
        modules += [base.get_output_embeddings()]
        if not placement.embedding_on_host:
            modules += [engine.decoder.embed_tokens]
        for module in modules:
            if module is not None:
                module.to(engine.device)
    if placement.adapters_on_host:
        engine.move_adapters_to_host()
    else:
        for parameter in (p for group in engine.groups for p in group.parameters):
            parameter.data = parameter.data.to(engine.device)
    if placement.embedding_on_host:
        engine.move_embedding_to_host()


def _check_shape(decoder: Any, config: Any) -> None:
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}

    def weighty(module: Any) -> set[str]:
        return {n for n, m in module.named_children() if next(m.parameters(), None) is not None}

    for layer in decoder.layers:
        extra = weighty(layer) - known
        if extra:
            raise Unsupported(f"its layers have {', '.join(sorted(extra))}")
        parts = weighty(layer.self_attn)
        if not projections <= parts <= projections | {"q_norm", "k_norm"}:
            raise Unsupported("its attention has other parts")
    if getattr(config, "attention_dropout", 0.0):
        raise Unsupported("attention dropout")


def _switched_off(module: Any) -> bool:
    return bool(module.merged or module.disable_adapters or "default" not in module.active_adapters)
