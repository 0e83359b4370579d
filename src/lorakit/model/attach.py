"""A PEFT model enters; the same model leaves with its decoder layers on the fast path, verified.

Nothing is patched beyond this one instance: its modules, parameters and their names stay, so
adapters are saved by PEFT as ever. A call the fast path does not serve (generation with a cache,
adapters switched off or merged) goes through the model's own layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.model.attention import Segments
from lorakit.model.families import FAST_FAMILIES
from lorakit.model.fast_layer import Arena, FastLayer, Keep, Pass
from lorakit.model.lora_group import Scratch, Unsupported, refresh
from lorakit.model.modes import evaluating
from lorakit.ops.backend import kernels_reason
from lorakit.ops.hash_mask import draw_keys

# Largest relative difference of a layer's update on the probe: rounding of the type, with room.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
PROBE_TOKENS = 32


@dataclass
class Engine:
    """The fast path of one model: its layers, and the decoder around them."""

    decoder: Any
    layers: list[FastLayer]
    scratch: Scratch = field(default_factory=dict)
    home: torch.device | None = None  # of the embedding, while that lies on the host

    def __post_init__(self) -> None:
        # PEFT switches all adapters at once, but any one may be the only kind there is.
        self.adapted = [m for m in self.decoder.modules() if hasattr(m, "lora_A")]

    @property
    def groups(self) -> list[Any]:
        return [group for layer in self.layers for group in layer.groups]

    def keep(self, levels: list[Keep]) -> None:
        """Choose what each layer keeps for backward."""
        for layer, level in zip(self.layers, levels, strict=True):
            layer.keep = level

    def serves(self, length: int) -> bool:
        """True where the fast path computes what the model would: adapters on, window not hit."""
        if any(layer.window and length > layer.window for layer in self.layers):
            return False
        return not any(_switched_off(module) for module in self.adapted)

    @property
    def embedding_on_host(self) -> bool:
        """True after `move_embedding_to_host`."""
        return self.home is not None

    def move_embedding_to_host(self) -> None:
        """Leave the card's memory to the rest: rows are looked up on the host for each batch."""
        if self.home is None:
            self.home = self.decoder.embed_tokens.weight.device
            self.decoder.embed_tokens.cpu()

    def embed_on_host(self, input_ids: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids on the host, page-locked where they go to a card."""
        found: Tensor = self.decoder.embed_tokens(input_ids)
        on_card = self.home is not None and self.home.type == "cuda"
        return found.pin_memory() if on_card else found

    def _embed(self, input_ids: Tensor) -> Tensor:
        if self.home is None:
            embedded: Tensor = self.decoder.embed_tokens(input_ids)
            return embedded
        return self.embed_on_host(input_ids.cpu()).to(input_ids.device)

    def __call__(
        self,
        input_ids: Any,
        position_ids: Tensor | None,
        segments: Segments | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm, of right-padded rows or one packed row."""
        training = self.decoder.training
        refresh(self.groups, training)
        hidden = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        cos, sin = self.decoder.rotary_emb(hidden, position_ids=position_ids)
        masks = max((layer.masks for layer in self.layers), default=0)
        keys = None
        if training and masks:
            keys = draw_keys(len(self.layers) * masks, hidden.device)
            keys = keys.view(len(self.layers), masks, 2)
        arena = None
        if torch.is_grad_enabled():
            arena = Arena(self.layers, hidden.shape[:-1].numel(), hidden.shape[-1], hidden)
        call = Pass(cos, sin, segments, keys, training, arena)
        for layer in self.layers:
            hidden = layer(hidden, call)
        return self.decoder.norm(hidden)

    def detach(self) -> None:
        """Give every module a weight of its own again, as savers expect, and where it was."""
        if self.home is not None:
            self.decoder.embed_tokens.to(self.home)
            self.home = None
        for group in self.groups:
            group.unmerge()
            group.a_sink = group.b_sink = None


def attach_engine(base: Any, device_kind: str) -> tuple[Engine | None, str]:
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
        layers = [FastLayer(x, i, config, scratch) for i, x in enumerate(decoder.layers)]
    except (Unsupported, AttributeError) as error:
        return None, f"{error}: PEFT's own layers"
    engine = Engine(decoder, layers, scratch)
    for layer in layers:
        for group in layer.groups:
            group.merge()
        if device_kind == "cuda":
            # The parts go back at once; left cached, small tensors would settle in them for good.
            torch.cuda.empty_cache()
    difference = _probe(engine, base)
    tolerance = TOLERANCE[layers[0].qkv.kind]
    if not difference < tolerance:
        engine.detach()
        return None, f"the probe differs by {difference:.1%} from the model's own: its own layers"
    return engine, (
        f"{len(layers)} fused layers, {kernels_reason(device_kind)}; "
        f"probe differs by {difference:.2%} from the model's own"
    )


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


def _probe(engine: Engine, base: Any) -> float:
    """Largest relative difference |ours - own| / |own - input| of one layer, each on equal inputs.

    Layer by layer: over the whole depth even two bf16 runs of one model drift apart by percents.
    """
    config = base.config.get_text_config()
    device = engine.decoder.embed_tokens.weight.device
    ids = (torch.arange(PROBE_TOKENS, device=device).unsqueeze(0) * 7919 + 13) % config.vocab_size
    places = torch.arange(PROBE_TOKENS, device=device).unsqueeze(0)
    refresh(engine.groups, training=False)
    with evaluating(base):
        hidden = engine.decoder.embed_tokens(ids)
        cos, sin = engine.decoder.rotary_emb(hidden, position_ids=places)
        call = Pass(cos, sin, None, None, False)
        differences = [torch.zeros((), device=device)]
        for fast, own in zip(engine.layers, engine.decoder.layers, strict=True):
            out = own(
                hidden,
                attention_mask=None,
                position_ids=places,
                position_embeddings=(cos, sin),
                use_cache=False,
            )
            out = out[0] if isinstance(out, tuple) else out
            error = (fast(hidden, call) - out).float().norm()
            differences.append(error / (out - hidden).float().norm())
            hidden = out
        return float(torch.stack(differences).max())


def _switched_off(module: Any) -> bool:
    return bool(module.merged or module.disable_adapters or "default" not in module.active_adapters)
