"""Cross-entropy of supervised tokens from their hidden states, summed or of each token.

    loss_i = logsumexp(z_i) - z_i[t_i] = -log p(t_i)      z = head(h)     h [N, D], head: D -> V
    dz_i   = softmax(z_i) - onehot(t_i)                   dh = dz W       t [N]

A function of the losses of tokens, such as DPO's, has the gradient g_i dh_i, where g_i is its own
derivative: one pass over the vocabulary is enough for any of them.

The caller gathers supervised tokens, so prompt and padding positions are not multiplied with the
vocabulary. Logits exist for one chunk at a time: with V = 32,000 and 2,048 tokens a complete
float32 copy and its gradient would take 0.5 GB, with V = 152,000 2.5 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorakit.ops.backend import has_kernels

# Maximum bytes of float32 logits that exist at once.
LOGITS_BYTES = 512 * 1024**2

Head = Callable[[Tensor], Tensor]


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Sum of -log p(target) in nats over N tokens, a float32 scalar.

    Args:
        hidden: [N, D] hidden states of the positions that predict `targets`.
        targets: [N] token ids; negative ones are ignored (padding to a fixed size).
        head: maps [n, D] to logits [n, V]. If it has an attribute `frozen_weight` [V, D], it is
            only that product, and the gradient is computed along with the loss; otherwise it may
            hold trainable parameters, and each chunk is recomputed in backward.
        logits_bytes: budget for float32 logits.
    """
    if hidden.shape[0] == 0:
        return hidden.sum().float() * 0.0
    weight = getattr(head, "frozen_weight", None)
    if weight is not None:
        losses: Tensor = _FrozenHead.apply(hidden, targets, weight, logits_bytes)
        return losses.sum()
    rows = max(1, logits_bytes // (4 * _vocabulary_size(head, hidden)))
    if hidden.shape[0] <= rows:
        return reference(hidden, targets, head)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(reference, chunk, target, head, use_reentrant=False)
    return total


def token_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """-log p(target) of each token in nats, float32 [N]; 0 for ignored targets.

    Args: as for `summed_cross_entropy`.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(-1).float()
    weight = getattr(head, "frozen_weight", None)
    if weight is not None:
        losses: Tensor = _FrozenHead.apply(hidden, targets, weight, logits_bytes)
        return losses
    rows = max(1, logits_bytes // (4 * _vocabulary_size(head, hidden)))
    if hidden.shape[0] <= rows:
        return reference(hidden, targets, head, "none")
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [checkpoint(reference, h, t, head, "none", use_reentrant=False) for h, t in chunks]
    )


def reference(hidden: Tensor, targets: Tensor, head: Head, reduction: str = "sum") -> Tensor:
    """The definition: all logits at once, in float32."""
    logits, known = head(hidden).float(), targets.clamp(min=-1)
    return functional.cross_entropy(logits, known, ignore_index=-1, reduction=reduction)


class _FrozenHead(torch.autograd.Function):
    """Losses [N] and dh in one pass over the vocabulary; a chunk's gradient overwrites its logits.

    A loss depends on its own row of `hidden` only, so dh is scaled by row in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, logits_bytes: int
    ) -> Tensor:
        rows = max(1, logits_bytes // (4 * weight.shape[0]))
        wants = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden, dtype=weight.dtype) if wants else None
        losses = []
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                logits = hidden[chunk].to(weight.dtype) @ weight.t()
                losses.append(cross_entropy_(logits, targets[chunk], wants))
                if grad is not None:
                    torch.mm(logits, weight, out=grad[chunk])
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.kind = hidden.dtype
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        if len(scale) == 1 or scale.stride(0) == 0:  # of a sum: one factor for all rows
            return (grad * scale[0]).to(ctx.kind), None, None, None
        scaled = torch.empty_like(grad, dtype=ctx.kind)
        torch.mul(grad, scale.unsqueeze(1), out=scaled)  # in float32 without a copy of it
        return scaled, None, None, None


def cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Loss of each row [n] float32; with `gradient`, logits [n, V] are overwritten with dz."""
    if has_kernels(logits):
        from lorakit.ops.cross_entropy_triton import cross_entropy_triton_

        return cross_entropy_triton_(logits, targets, gradient)
    return cross_entropy_reference_(logits, targets, gradient)


def cross_entropy_reference_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The definition of `cross_entropy_`."""
    log_p = functional.log_softmax(logits.float(), -1)
    counts = (targets >= 0).float()
    chosen = targets.clamp(min=0).unsqueeze(1)
    loss = -log_p.gather(1, chosen).squeeze(1) * counts
    if gradient:
        dz = log_p.exp_().scatter_add_(1, chosen, -torch.ones_like(loss).unsqueeze(1))
        logits.copy_(dz * counts.unsqueeze(1))
    return loss


def _vocabulary_size(head: Head, hidden: Tensor) -> int:
    size = getattr(head, "vocabulary", None)
    if size is not None:
        return int(size)
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]
