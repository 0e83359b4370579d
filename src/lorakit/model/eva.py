"""Initialize adapters from data: EVA, explained variance adaptation (arXiv 2410.07170)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lorakit.data.batching import collate
from lorakit.errors import RunError
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.types import IGNORE, Example

# The directions hardly move after some tens of thousands of tokens.
BATCH_TOKENS, BATCHES = 4096, 16


def eva_weights(model: Any, rows: Sequence[Example], seed: int) -> dict[str, Tensor]:
    """Compute lora_A of each layer as the first right singular vectors of its inputs (EVA).

    The inputs are those at supervised tokens; a batch at a time is merged into the singular vectors
    found so far. peft's own pass makes a Python tuple of each layer's inputs, 16.7 million floats
    for 4,096 tokens of a 7B model, and does not end when the data has fewer tokens than `lora_r`.

    Args:
        model: peft model on its device.
        rows: training examples; the first ones are used.

    Returns:
        float32 [R, D_in] on the CPU by the name of the module.

    Raises:
        RunError: fewer tokens than `lora_r`.
    """
    layers = {n: m for n, m in model.named_modules() if getattr(m, "lora_A", None)}
    device, found = device_of(model), dict[str, Tensor]()
    mask = torch.empty(0)
    last: tuple[Tensor, Tensor] | None = None  # input and result: q, k and v share theirs

    def merge(name: str, rank: int, inputs: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not inputs or len(last[1]) != rank:
            whole = inputs[..., 0].numel() == mask.numel()  # False in an expert
            data = inputs.reshape(*mask.shape, -1)[mask] if whole else inputs.flatten(0, -2)
            data = data.float()
            data = torch.cat([found[name], data]) if name in found else data
            _, values, vectors = torch.svd_lowrank(data, q=min(rank + 8, *data.shape), niter=4)
            last = inputs, (values.unsqueeze(1) * vectors.T)[:rank]
        found[name] = last[1]

    hooks = [
        layer.base_layer.register_forward_pre_hook(
            lambda _, inputs, name=name, rank=layer.r["default"]: merge(name, rank, inputs[0])
        )
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model), model.disable_adapter(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in itertools.islice(_batches(rows), BATCHES):
                padded = collate(batch, 0)
                mask = pad_sequence(
                    [torch.tensor(row.labels) != IGNORE for row in batch], batch_first=True
                ).to(device)
                keys = ("input_ids", "attention_mask")
                model(**{k: padded[k].to(device) for k in keys if k in padded})
                last = None
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in found.items():
        norms, rank = value.norm(dim=1), layers[name].r["default"]
        directions = int((norms > norms[0] * 1e-5).sum())
        if directions < rank:
            raise RunError(
                f"init_lora_weights: eva: {sum(row.trained_tokens for row in rows)} trained tokens "
                f"give {directions} directions, lora_r of {name} needs {rank}",
                hint="set init_lora_weights: true, or a lower lora_r",
            )
    return {n: normalize(v, dim=1).cpu() for n, v in found.items()}


def set_lora_a(model: Any, weights: dict[str, Tensor]) -> None:
    """Copy `weights` into lora_A of the modules they are named after."""
    for name, value in weights.items():
        model.get_submodule(name).lora_A["default"].weight.data.copy_(value)


def _batches(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield examples in batches of about BATCH_TOKENS padded tokens."""
    batch: list[Example] = []
    for row in rows:
        batch.append(row)
        if max(len(r.input_ids) for r in batch) * len(batch) >= BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch
