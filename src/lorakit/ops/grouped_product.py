"""Products of sorted tokens with the weights of their experts, and the low-rank updates.

Rows are sorted by expert, c_e rows for expert e. For the rows of expert e, with PEFT's dropout mask
m on the adapter's input (LoRA, arXiv 2106.09685, eq. 3; f = alpha / r, over 1 - p in training):

    y = x W_e^T                   dx = dy W_e                               W_e frozen
    u = s B_e^T                   s = (m * x) A'_e^T                        A' = f A
    ds = du B_e                   dB_e = du^T s
    dA_e = f ds^T (m * x)         dx += m * (ds A'_e)

Frozen weights are made for a group of experts at a time, only for experts that have rows, and again
in backward; they may be dequantized or copied each time. The mask is recomputed from its key.
Shapes: S rows, E experts, K inputs, N outputs, rank R; A [E, R, K], B [E, N, R].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels, has_matrix_kernels
from lorakit.ops.dropout_mask import keep_mask
from lorakit.ops.nf4_experts import rows_of

# Dense weights that exist at once: gate and up of 42 of Qwen3-30B-A3B's 128 experts. All of a layer
# are 1.2 GB.
GROUP_BYTES = 256 * 1024**2

# Dense weights [G, N, K] of the experts of these numbers.
Dense = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """Experts whose rows follow each other: their numbers, counts of rows, and the rows."""

    experts: list[int]
    counts: list[int]
    rows: slice


def groups_of(counts: Sequence[int], most: int) -> Iterator[Group]:
    """Yield the experts that have rows, `most` at a time."""
    used = [expert for expert, count in enumerate(counts) if count]
    start = 0
    for first in range(0, len(used), max(1, most)):
        experts = used[first : first + max(1, most)]
        sizes = [counts[expert] for expert in experts]
        yield Group(experts, sizes, slice(start, start + sum(sizes)))
        start += sum(sizes)


def grouped_mm(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of x [S, K] times the matrix of their group in `weights` [G, K, N]: [S, N]."""
    if _has_grouped_mm(x, weights):
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x, weights, offs=ends.to(x.device))
    out = x.new_empty(x.shape[0], weights.shape[2])
    for rows, weight, place in zip(
        x.split(list(counts)), weights, out.split(list(counts)), strict=True
    ):
        torch.mm(rows, weight, out=place)
    return out


def grouped_outer(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """left_e^T right_e for the rows of each group, [S, N] and [S, K]: float32 [G, N, K]."""
    if _has_grouped_mm(left, right):
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
        product = torch.nn.functional.grouped_mm(left.t(), right, offs=ends.to(left.device))
        return product.float()
    out = torch.empty(
        len(counts), left.shape[1], right.shape[1], dtype=torch.float32, device=left.device
    )
    for a, b, place in zip(left.split(list(counts)), right.split(list(counts)), out, strict=True):
        place.copy_(a.t() @ b)
    return out


def _has_grouped_mm(x: Tensor, weights: Tensor) -> bool:
    """True for bfloat16 on GPUs from compute capability 8.0, rows aligned to 16 bytes."""
    if x.dtype != torch.bfloat16 or not has_matrix_kernels(x):
        return False
    return not any(size % 8 for size in (*x.shape[1:], *weights.shape[1:]))


def experts_at_once(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Number of experts [N, K] whose dense weights are made at once."""
    return max(1, GROUP_BYTES // (outputs * inputs * dtype.itemsize))


class FrozenProduct(torch.autograd.Function):
    """y = x W_e^T; x [S, K] -> [S, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Dense, counts: Sequence[int], outputs: int) -> Tensor:
        ctx.dense, ctx.counts = dense, counts
        ctx.most = experts_at_once(outputs, x.shape[1], x.dtype)
        return _joined(
            grouped_mm(x[group.rows], dense(group.experts).transpose(1, 2), group.counts)
            for group in groups_of(counts, ctx.most)
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous()
        dx = _joined(
            grouped_mm(dy[group.rows], ctx.dense(group.experts), group.counts)
            for group in groups_of(ctx.counts, ctx.most)
        )
        return dx, None, None, None


class LowRankUpdate(torch.autograd.Function):
    """u = f (m * x) A_e^T B_e^T; x [S, K] -> [S, N]; A and B are float32 and so are their grads."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        key: Tensor | None,
        p: float,
        factor: float,
        counts: Sequence[int],
    ) -> Tensor:
        used = [expert for expert, count in enumerate(counts) if count]
        ctx.used, ctx.counts = used, [counts[expert] for expert in used]
        ctx.p, ctx.factor = p, factor
        down, up = _copies(ctx, x, a, b)
        s = grouped_mm(_masked(x, key, p), down.transpose(1, 2), ctx.counts)
        ctx.save_for_backward(x, s, a, b, key)
        return grouped_mm(s, up.transpose(1, 2), ctx.counts)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Any:
        x, s, a, b, key = ctx.saved_tensors
        du = du.contiguous()
        down, up = _copies(ctx, x, a, b)
        ds = grouped_mm(du, up, ctx.counts)
        dx = _masked(grouped_mm(ds, down, ctx.counts), key, ctx.p)
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        used = torch.tensor(ctx.used, device=x.device)
        masked = _masked(x, key, ctx.p)
        da[used] = grouped_outer(ds, masked, ctx.counts).mul_(ctx.factor)
        db[used] = grouped_outer(du, s, ctx.counts)
        return dx, da, db, None, None, None, None


def _joined(parts: Iterable[Tensor]) -> Tensor:
    products = list(parts)
    return products[0] if len(products) == 1 else torch.cat(products)


def _copies(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A' [G, R, K] and B [G, N, R] of the experts with rows, in the dtype of x, contiguous."""
    down = (rows_of(a, ctx.used) * ctx.factor).to(x.dtype)
    return down.contiguous(), rows_of(b, ctx.used).to(x.dtype).contiguous()


def _masked(x: Tensor, key: Tensor | None, p: float) -> Tensor:
    if key is None or p == 0.0:
        return x
    if has_kernels(x):
        from lorakit.ops.dropout_mask_triton import masked_triton

        return masked_triton(x, key, p)
    return x * keep_mask(key, x.shape[0], x.shape[1], p).to(x.dtype)
