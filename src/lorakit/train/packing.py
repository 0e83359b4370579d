"""Isolate the documents of a packed row in a model's own layers, and prove it.

Attention separates documents by position ids that restart; convolutions and recurrent layers need
their borders (`model/kernel_functions.py`). Whatever a model does with these, documents are packed
only if the second of two proves to be independent of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.engine.compiled_layers import CompiledLayers
from lorakit.model.architectures import MASKS_WITHOUT_POSITIONS
from lorakit.model.base_class import text_decoder
from lorakit.model.eval_mode import evaluating
from lorakit.model.kernel_functions import document_arguments, kernel_functions

PACKED = "documents share micro-batches without padding"
# Raised by models whose modules have other names or signatures than a probe expects.
PROBE_ERRORS = (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError)

# Largest differences of a packed document from the same one alone that sums in another order
# explain: of its states, and of its gradient. In bfloat16 states differ by up to 3% with 36 layers,
# gradients by up to 20% (Gemma 4's experts, AVX2). Dependence on another document is not a matter
# of rounding: its gradient is zero.
_ROUNDING = {torch.float32: (1e-3, 1e-3)}
_ROUNDING_16_BITS = (5e-2, 5e-1)


class PackedRows:
    """Arguments of a model's own layers for packed rows."""

    def __init__(self, base: Any, compiled: CompiledLayers | None = None) -> None:
        self.config = base.config.get_text_config()
        self.borders = bool(kernel_functions(base))
        # Compiled layers' own attention isolates documents by their borders, without a mask.
        self.attends_by_borders = compiled is not None and not compiled.own_attention
        masked = self.config.model_type in MASKS_WITHOUT_POSITIONS
        self.mask = masked and not self.attends_by_borders
        self.dtype = base.dtype

    def arguments(
        self,
        borders: Tensor,
        lengths: Sequence[int],
        position_ids: Tensor,
        longest: int | None = None,
    ) -> dict[str, Any]:
        """Arguments of the decoder for one packed row.

        Args:
            borders: cumulative lengths int32 [n + 1]; `lengths` are the same on the host, or empty
                if they were padded to a fixed number of documents.
            position_ids: [1, T], restarting at each document.
            longest: length of the longest document; by default that of `lengths`.
        """
        given: dict[str, Any] = {"position_ids": position_ids}
        if self.attends_by_borders:
            given |= {"cu_seq_lens_q": borders, "max_length_q": longest or max(lengths)}
        if self.borders:
            given |= document_arguments(borders, position_ids.shape[1], lengths)
        if self.mask:
            from transformers.masking_utils import create_causal_mask

            like = torch.empty(*position_ids.shape, 1, dtype=self.dtype, device=borders.device)
            given["attention_mask"] = create_causal_mask(
                config=self.config,
                inputs_embeds=like,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
            )
        return given


def in_turn_reason(base: Any) -> str | None:
    """Reason against packing on a GPU: recurrent layers that take documents one at a time.

    Qwen3.5-4B on an H200: 1,103 tokens/s packed, 1,552 padded
    (benchmarks/results/packed_hybrids_h200.json).
    """
    functions = [f for f in kernel_functions(base) if f.recurrent_in_torch]
    if not functions:
        return None
    missing = sorted({package for f in functions if (package := f.missing_package)})
    install = f"; pip install {' '.join(missing)}" if missing else ""
    return f"off: recurrent layers without a kernel take documents one at a time{install}"


def isolates_documents(base: Any, compiled: CompiledLayers | None = None) -> str:
    """PACKED, or the reason why the model's own layers cannot take packed documents.

    The states of the second of two documents must not depend on the first: their gradient by its
    embeddings is exactly zero, in every dtype. They, and their gradient by the second document's
    own embeddings, have to be what they are for this document alone.
    """
    config, device = base.config.get_text_config(), base.device
    # Without the padding token: its embedding is zero, where a norm has no gradient (Gemma 3n).
    ids = (torch.arange(12, device=device) * 31 + 1) % (config.vocab_size - 1)
    ids += ids >= (config.vocab_size if config.pad_token_id is None else config.pad_token_id)
    lengths = (5, 7)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    try:
        rows = PackedRows(base, compiled)
        packed = rows.arguments(borders, lengths, positions)
        with evaluating(base), torch.enable_grad():
            # Compiled layers are compared with themselves: others round differently in bfloat16.
            only = (
                rows.arguments(borders[1:] - 5, lengths[1:], positions[:, 5:]) if compiled else {}
            )
            alone, expected = _states_and_gradient(base, compiled, ids[5:], only)
            states, gradient = _states_and_gradient(base, compiled, ids, packed, 5)
    except PROBE_ERRORS as error:
        return f"off: {type(error).__name__} with packed documents"
    if not gradient.isfinite().all():
        return "off: the gradient of two packed documents is not finite"
    if gradient[:, :5].any():
        return "off: this model's layers mix packed documents"
    limits = _ROUNDING.get(states.dtype, _ROUNDING_16_BITS)
    found = _distance(states, alone), _distance(gradient[:, 5:], expected)
    for difference, limit in zip(found, limits, strict=True):
        if not difference < limit:
            return f"off: a packed document differs from the same one alone by {difference:.0%}"
    return PACKED


def _states_and_gradient(
    base: Any,
    compiled: CompiledLayers | None,
    ids: Tensor,
    arguments: dict[str, Any],
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """States from position `start` on, and the gradient of their weighted sum by all embeddings.

    The plain sum of what a LayerNorm returns is zero, whatever its input is.
    """
    decoder = text_decoder(base)
    embedded: list[Tensor] = []

    def leaf(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = decoder.get_input_embeddings().register_forward_hook(leaf)
    try:
        inputs = {"input_ids": ids.unsqueeze(0), **arguments}
        output = (
            decoder(**inputs, use_cache=False)[0] if compiled is None else compiled(inputs, False)
        )
        states = output[:, start:]
    finally:
        hook.remove()
    weights = torch.arange(states.numel(), device=states.device).cos().view(states.shape)
    (gradient,) = torch.autograd.grad((states.float() * weights).sum(), embedded[0])
    return states.detach(), gradient


def _distance(states: Tensor, reference: Tensor) -> float:
    """Relative difference of the median token: rounding sends a few to another expert."""
    change = (states - reference).float().norm(dim=-1) / reference.float().norm(dim=-1)
    return float(change.median())
