"""Products of sorted tokens with the weights of their experts, and the low-rank updates.

Rows are sorted by expert, c_e rows for expert e. For the rows of expert e, with PEFT's dropout mask
m on the adapter's input (LoRA, arXiv 2106.09685, eq. 3; f = alpha / r, over 1 - p in training):

    y = x W_e^T                   dx = dy W_e                               W_e frozen
    u = s B_e^T                   s = (m * x) A'_e^T                        A' = f A
    ds = du B_e                   dB_e = du^T s
    dA_e = f ds^T (m * x)         dx += m * (ds A'_e)

Frozen weights are made for a group of experts at a time, only for experts that have rows, and again
in backward; they may be dequantized or copied each time. The mask is recomputed from its key.

`Counts` are the experts' numbers of rows on the host; or, on the GPU, the end of each expert's
rows: then all experts' weights are made at once, nothing waits for the host, and CUDA graphs can be
captured.
Shapes: S rows, E experts, K inputs, N outputs, rank R; A [E, R, K], B [E, N, R].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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

# Elements of a mask made in plain torch, which takes 8 bytes for each.
MASKED_AT_ONCE = 2**24

# Dense weights [G, N, K] of the experts of these numbers.
Dense = Callable[[Sequence[int]], Tensor]
# Rows of each expert, or the ends int32 [E] of their rows on the GPU.
Counts = Sequence[int] | Tensor


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


def grouped_mm(x: Tensor, weights: Tensor, counts: Counts) -> Tensor:
    """Rows of x [S, K] times the matrix of their group in `weights` [G, K, N]: [S, N]."""
    if isinstance(counts, Tensor):
        return torch.nn.functional.grouped_mm(x, weights, offs=counts)
    if has_grouped_mm(x, *weights.shape[1:]):
        return torch.nn.functional.grouped_mm(x, weights, offs=_ends(counts, x.device))
    out = x.new_empty(x.shape[0], weights.shape[2])
    if len(set(counts)) == 1:  # rows spread evenly, as in a memory plan
        even = (len(counts), counts[0], -1)
        torch.bmm(x.reshape(even), weights, out=out.view(even))
        return out  # no view, so that autograd lets it be changed in place
    for rows, weight, place in zip(
        x.split(list(counts)), weights, out.split(list(counts)), strict=True
    ):
        torch.mm(rows, weight, out=place)
    return out


def grouped_outer(left: Tensor, right: Tensor, counts: Counts) -> Tensor:
    """left_e^T right_e for the rows of each group, [S, N] and [S, K]: float32 [G, N, K]."""
    if isinstance(counts, Tensor) or has_grouped_mm(left, right.shape[1]):
        ends = counts if isinstance(counts, Tensor) else _ends(counts, left.device)
        return torch.nn.functional.grouped_mm(left.t(), right, offs=ends).float()
    if len(set(counts)) == 1:
        a, b = (t.reshape(len(counts), counts[0], -1) for t in (left, right))
        return torch.bmm(a.transpose(1, 2), b).float()
    out = torch.empty(
        len(counts), left.shape[1], right.shape[1], dtype=torch.float32, device=left.device
    )
    for a, b, place in zip(left.split(list(counts)), right.split(list(counts)), out, strict=True):
        place.copy_(a.t() @ b)
    return out


def has_grouped_mm(x: Tensor, *sizes: int) -> bool:
    """True for bfloat16 on GPUs from compute capability 8.0, rows aligned to 16 bytes.

    Args:
        sizes: of the other matrix.
    """
    if x.dtype != torch.bfloat16 or not has_matrix_kernels(x):
        return False
    return not any(size % 8 for size in (*x.shape[1:], *sizes))


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=device)


def experts_at_once(outputs: int, inputs: int, dtype: torch.dtype, most_bytes: int) -> int:
    """Number of experts [N, K] whose dense weights are made at once."""
    return max(1, most_bytes // (outputs * inputs * dtype.itemsize))


class FrozenProduct(torch.autograd.Function):
    """y = x W_e^T; x [S, K] -> [S, N].

    Args:
        most: experts whose weights are made at once; all, if `counts` are on the GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dense: Dense, counts: Counts, outputs: int, most: int
    ) -> Tensor:
        ctx.dense, ctx.counts, ctx.inputs, ctx.most = dense, counts, x.shape[1], most
        if isinstance(counts, Tensor):
            return grouped_mm(x, dense(range(len(counts))).transpose(1, 2), counts)

        def product(group: Group) -> Tensor:
            weights = dense(group.experts).transpose(1, 2)
            return grouped_mm(x[group.rows], weights, group.counts)

        return _by_group(product, counts, ctx.most, x, outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy, counts = dy.contiguous(), ctx.counts
        if isinstance(counts, Tensor):
            dx = grouped_mm(dy, ctx.dense(range(len(counts))), counts)
            return dx, None, None, None, None

        def product(group: Group) -> Tensor:
            return grouped_mm(dy[group.rows], ctx.dense(group.experts), group.counts)

        return _by_group(product, counts, ctx.most, dy, ctx.inputs), None, None, None, None


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
        counts: Counts,
    ) -> Tensor:
        if isinstance(counts, Tensor) and not has_grouped_mm(x, a.shape[1]):
            counts = torch.diff(counts, prepend=counts.new_zeros(1)).tolist()
        if isinstance(counts, Tensor):
            ctx.used, ctx.counts = None, counts
        else:
            ctx.used = [expert for expert, count in enumerate(counts) if count]
            ctx.counts = [counts[expert] for expert in ctx.used]
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
        of_a = grouped_outer(ds, _masked(x, key, ctx.p), ctx.counts).mul_(ctx.factor)
        of_b = grouped_outer(du, s, ctx.counts)
        if ctx.used is None:
            return dx, of_a, of_b, None, None, None, None
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        used = torch.tensor(ctx.used, device=x.device)
        da[used], db[used] = of_a, of_b
        return dx, da, db, None, None, None, None


def _by_group(
    product: Callable[[Group], Tensor], counts: Sequence[int], most: int, like: Tensor, width: int
) -> Tensor:
    """Products of all groups; each is made beside the result, which `cat` would hold twice."""
    groups = list(groups_of(counts, most))
    if len(groups) == 1:
        return product(groups[0])
    out = like.new_empty(like.shape[0], width)
    for group in groups:
        out[group.rows] = product(group)
    return out


def _copies(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A' [G, R, K] and B [G, N, R] of the experts with rows, in the dtype of x, contiguous."""
    if ctx.used is not None:
        a, b = rows_of(a, ctx.used), rows_of(b, ctx.used)
    return (a * ctx.factor).to(x.dtype).contiguous(), b.to(x.dtype).contiguous()


def _masked(x: Tensor, key: Tensor | None, p: float) -> Tensor:
    if key is None or p == 0.0:
        return x
    if has_kernels(x):
        from lorakit.ops.dropout_mask_triton import masked_triton

        return masked_triton(x, key, p)
    out = torch.empty_like(x)
    step = max(1, MASKED_AT_ONCE // x.shape[1])
    for first in range(0, len(x), step):
        rows = x[first : first + step]
        mask = keep_mask(key, len(rows), x.shape[1], p, first)
        torch.mul(rows, mask, out=out[first : first + step])
    return out
