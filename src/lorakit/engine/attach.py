"""A PEFT model enters; the same model leaves with its decoder layers on the fast path, verified.

Nothing is patched beyond this one instance: its modules, parameters and their names stay, so
adapters are saved by PEFT as ever. A call the fast path does not serve (generation with a cache,
adapters switched off or merged) goes through the model's own layers.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

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
from lorakit.ops.backend import kernels_reason
from lorakit.ops.dropout_mask import draw_keys
from lorakit.types import ON_CARD, Placement


@dataclass
class Engine:
    """The fast path of one model: its layers, and the decoder around them."""

    decoder: Any
    layers: list[FastLayer]
    device: torch.device
    scratch: Scratch = field(default_factory=dict)
    streamed: StreamedBase | None = None
    host_adapters: HostAdapters | None = None
    embedding_on_host: bool = False
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        # PEFT switches all adapters at once, but any one may be the only kind there is.
        self.adapted = [m for m in self.decoder.modules() if hasattr(m, "lora_A")]

    @property
    def groups(self) -> list[Any]:
        return [group for layer in self.layers for group in layer.groups]

    def keep(self, levels: list[SavedActivations]) -> None:
        """Choose what each layer keeps for backward."""
        for layer, level in zip(self.layers, levels, strict=True):
            layer.keep = level

    def serves(self, length: int) -> bool:
        """True where the fast path computes what the model would: adapters on, window not hit."""
        windows = [layer.attention.window for layer in self.layers]
        if any(window and length > window for window in windows):
            return False
        return not any(_switched_off(module) for module in self.adapted)

    def move_embedding_to_host(self) -> None:
        """Leave the card's memory to the rest: rows are looked up on the host for each batch."""
        if not self.embedding_on_host:
            self.embedding_on_host = True
            embedding = self.decoder.embed_tokens.cpu()
            before = embedding.register_forward_pre_hook(lambda _, given: (given[0].cpu(),))
            after = embedding.register_forward_hook(lambda _, __, found: found.to(self.device))
            # `generate` sends ids and positions to where the first parameter is: the host.
            moved = self.decoder.register_forward_pre_hook(self._inputs_to_device, with_kwargs=True)
            self.hooks += [before, after, moved]

    def _inputs_to_device(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def moved(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    def embed_on_host(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids on the host, page-locked where they go to a card."""
        found: Tensor = self.decoder.embed_tokens.forward(input_ids)  # past the hooks
        return found.pin_memory() if self.device.type == "cuda" else found

    def stream_base(self, spread: DistributedContext | None = None) -> None:
        """Frozen weights of the layers go to host memory, or over ranks; by turns to the card."""
        groups = [layer.groups for layer in self.layers]
        self.streamed = StreamedBase(groups, self.device, spread)
        for number, layer in enumerate(self.decoder.layers):
            call = functools.partial(self._enter_own, number)
            self.hooks.append(layer.register_forward_pre_hook(call))

    def move_adapters_to_host(self) -> None:
        """Adapters go to host memory, and their gradients and optimizer with them."""
        self.host_adapters = HostAdapters([layer.groups for layer in self.layers], self.device)

    def enter(self, number: int, training: bool, following: int | None = None) -> None:
        """Layer `number` can be worked with from here on; the `following` one is on its way."""
        if self.streamed is not None:
            self.streamed.enter(number, following)
        if self.host_adapters is not None:
            self.host_adapters.enter(number, following)
            refresh(self.layers[number].groups, training)

    def begin(
        self, inputs: dict[str, Any], segments: Segments | None
    ) -> tuple[Tensor, ForwardContext]:
        """(embedded ids [B, T, D], what all layers share) of one micro-batch.

        Args:
            inputs: `input_ids` or `inputs_embeds`, and perhaps `position_ids`.
        """
        training = self.decoder.training
        hidden = inputs.get("inputs_embeds")
        if hidden is None:
            hidden = self.decoder.embed_tokens(inputs["input_ids"])
        places = inputs.get("position_ids")
        if places is None:
            places = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        angles = self.decoder.rotary_emb(hidden, position_ids=places)
        masks = max((layer.masks for layer in self.layers), default=0)
        keys = None
        if training and masks:
            keys = draw_keys(len(self.layers) * masks, hidden.device)
            keys = keys.view(len(self.layers), masks, 2)
        return hidden, ForwardContext(angles, segments, keys, training)

    def __call__(self, inputs: dict[str, Any], segments: Segments | None) -> Tensor:
        """Hidden states [B, T, D] after the last norm, of right-padded rows or one packed row."""
        hidden, call = self.begin(inputs, segments)
        if self.host_adapters is None:
            refresh(self.groups, call.training)
        if torch.is_grad_enabled():
            rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
            call = replace(call, arena=ActivationBuffers(self.layers, rows, width, hidden))
        for number, layer in enumerate(self.layers):
            last = number + 1 == len(self.layers)
            self.enter(number, call.training, None if last else number + 1)
            hidden = layer(hidden, call)
        return self.decoder.norm(hidden)

    def detach(self) -> None:
        """Give every module a weight of its own again, as savers expect.

        A streamed base and an embedding on the host stay there with their hooks: the GPU had no
        room for them, and evaluation takes more than a step (384 MiB too much within 7 GiB).
        """
        if self.host_adapters is not None:
            self.host_adapters.leave()
            self.host_adapters = None
        for group in self.groups:
            group.a_sink = group.b_sink = None
        if self.device.type == "cuda":
            # Gradient buffers kept the memory pool of the CUDA graphs: 430 MiB at 12 layers of 7B.
            torch.cuda.empty_cache()
        if self.streamed is None:
            for group in self.groups:
                group.unmerge()

    def _enter_own(self, number: int, *_: Any) -> None:
        """Before the model's own layer `number` runs (generation, probes)."""
        if self.streamed is not None:
            self.streamed.enter(number, (number + 1) % len(self.layers))
        if self.host_adapters is not None:
            self.host_adapters.enter(number)


def attach_engine(
    base: Any,
    device: torch.device,
    placement: Placement = ON_CARD,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> tuple[Engine | None, str]:
    """(engine, path) for the transformers model inside a PEFT model; None where it is not served.

    The engine's hidden states are compared with the model's own on a probe, so an architecture that
    looks like Llama and computes something else is refused, with the reason in `path`.
    """
    config = base.config.get_text_config()
    if config.model_type not in FAST_FAMILIES:
        return None, f"model family {config.model_type}: no fast path"
    decoder = base.get_decoder()
    scratch: Scratch = {}
    try:
        _check_shape(decoder, config)
        found = enumerate(decoder.layers)
        layers = [FastLayer(x, i, config, scratch, device) for i, x in found]
    except (Unsupported, AttributeError) as error:
        return None, f"{error}: PEFT's own layers"
    engine = Engine(decoder, layers, device, scratch)
    for layer in layers:
        for group in layer.groups:
            group.merge()
        if device.type == "cuda":
            # The parts go back at once; left cached, small tensors would settle in them for good.
            torch.cuda.empty_cache()
    _place(engine, base, placement, ranks)
    words, trouble = self_test(engine, base)
    if trouble:
        engine.detach()
        return None, f"{trouble}: its own layers"
    return engine, f"{len(layers)} fused layers, {kernels_reason(device.type)}; {words}"


def _place(engine: Engine, base: Any, placement: Placement, ranks: DistributedContext) -> None:
    """Let parts lie where the plan says; what is not of the layers goes to the card."""
    if placement.base_elsewhere:
        engine.stream_base(None if placement.base_on_host else ranks)
        if not placement.base_on_host:
            ranks.pass_baton()
        own = [(*layer.norms, *layer.attention.norms) for layer in engine.layers]
        parts = [engine.decoder.norm, engine.decoder.rotary_emb, *itertools.chain(*own)]
        parts += [base.get_output_embeddings()]
        if not placement.embedding_on_host:
            parts += [engine.decoder.embed_tokens]
        for part in parts:
            if part is not None:
                part.to(engine.device)
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
