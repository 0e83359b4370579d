"""The gated delta rule of `gated_delta_rule.py` and its gradients as Triton kernels.

No product takes the transpose of another product: Triton 3.4 to 3.7.0 compiles it wrongly for
Hopper. Where both are needed, the transpose is a product of its own.

ptxas 12.8, which Triton 3.6 brings, reads shared memory at an undefined address in scans without a
pipelined loop: with one stage, or where the number of chunks is the constant one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.delta_rule_layout import CHUNK, EPS, DeltaRuleSaved, empty_saved
from lorakit.ops.kernel_launch import Settings, launch_kernel

# BLOCK_N: columns of v that a program computes, or reads at a time (GRADS).
SCAN: Settings = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
SCAN_BACKWARD: Settings = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
OUTPUT: Settings = {"BLOCK_N": 128, "num_warps": 4, "num_stages": 1}
LOCAL: Settings = {"BLOCK_N": 128, "num_warps": 4, "num_stages": 1}
GRADS: Settings = {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
INVERSE: Settings = {"num_warps": 4, "num_stages": 1}
ROWS = 16  # that a program normalizes
# Compiled once for all lengths.
COUNTS = ["tokens", "chunks"]


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, DeltaRuleSaved]:
    """See `gated_delta_rule.delta_rule_reference`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    g, beta = g.contiguous(), beta.contiguous()
    batch, tokens, heads, width = v.shape
    documents = _each_row(documents, batch)
    key_heads, key_width = k.shape[2:]
    saved, out = empty_saved(q, v), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    chunks, rows = saved.states.shape[2], batch * tokens * key_heads
    _normalize_kernel[(triton.cdiv(rows, ROWS),)](
        q, k, saved.q, saved.k, saved.norms, rows, tokens, key_heads,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), key_width**-0.5, EPS,
        NORMALIZE=normalize, WIDTH=key_width, BLOCK_M=ROWS, num_warps=4,
    )  # fmt: skip
    shape: dict[str, Any] = {"K": key_width, "CHUNK": CHUNK}
    shared: dict[str, Any] = {"HEADS": heads, "GROUPS": heads // key_heads}
    launch_kernel(
        _inverse_kernel, INVERSE, lambda _: (chunks, batch * heads),
        saved.k, g, beta, documents, saved.gates, saved.inverse, tokens, chunks,
        DOCUMENTS=documents is not None, **shape, **shared,
    )  # fmt: skip
    launch_kernel(
        _scan_kernel, _columns(SCAN, width), lambda s: (width // s["BLOCK_N"], batch * heads),
        saved.k, v, saved.gates, saved.inverse, saved.written, saved.states, tokens, chunks,
        v.stride(0), v.stride(1), V=width, **shape, **shared,
    )  # fmt: skip
    launch_kernel(
        _output_kernel, _columns(OUTPUT, width),
        lambda s: (chunks, width // s["BLOCK_N"], batch * heads),
        saved.q, saved.k, saved.gates, documents, saved.written, saved.states, out,
        tokens, chunks, DOCUMENTS=documents is not None, V=width, **shape, **shared,
    )  # fmt: skip
    return out, saved


def delta_rule_backward_triton(
    dout: Tensor,
    v: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
    saved: DeltaRuleSaved,
) -> tuple[Tensor, ...]:
    """See `gated_delta_rule.delta_rule_backward_reference`."""
    dout, v = dout.contiguous(), _rows(v)
    saved = DeltaRuleSaved(*(t.contiguous() for t in saved))
    batch, tokens, heads, width = v.shape
    documents = _each_row(documents, batch)
    key_heads, key_width = saved.k.shape[2:]
    chunks, rows = saved.states.shape[2], batch * tokens * key_heads
    z, dstates = torch.empty_like(dout), torch.empty_like(saved.states)
    shape: dict[str, Any] = {"K": key_width, "V": width, "CHUNK": CHUNK}
    shared: dict[str, Any] = {"HEADS": heads, "GROUPS": heads // key_heads}
    launch_kernel(
        _local_kernel, _columns(LOCAL, width),
        lambda s: (chunks, width // s["BLOCK_N"], batch * heads),
        saved.q, saved.k, saved.gates, documents, dout, z, tokens, chunks,
        DOCUMENTS=documents is not None, **shape, **shared,
    )  # fmt: skip
    launch_kernel(
        _scan_backward_kernel, _columns(SCAN_BACKWARD, width),
        lambda s: (width // s["BLOCK_N"], batch * heads),
        saved.q, saved.k, saved.gates, saved.inverse, dout, z, dstates, tokens, chunks,
        **shape, **shared,
    )  # fmt: skip
    dq_heads, dk_heads = (v.new_empty(*v.shape[:3], key_width) for _ in "qk")
    dv, dbeta = (
        torch.empty_like(dout),
        torch.empty_like(beta, memory_format=torch.contiguous_format),
    )
    dg = torch.empty(beta.shape, dtype=saved.gates.dtype, device=v.device)
    launch_kernel(
        _grads_kernel, _columns(GRADS, width), lambda _: (chunks, batch * heads),
        saved.q, saved.k, v, saved.gates, documents, saved.written, saved.states, dout, z, dstates,
        dq_heads, dk_heads, dv, dg, dbeta, tokens, chunks, v.stride(0), v.stride(1),
        DOCUMENTS=documents is not None, **shape, **shared,
    )  # fmt: skip
    dq, dk = torch.empty_like(saved.q), torch.empty_like(saved.k)
    _sum_heads_kernel[(triton.cdiv(rows, ROWS),)](
        dq_heads, dk_heads, saved.q, saved.k, saved.norms, dq, dk, rows, key_width**-0.5,
        NORMALIZE=normalize, GROUPS=heads // key_heads, WIDTH=key_width, BLOCK_M=ROWS, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta


def _columns(settings: Settings, width: int) -> Settings:
    """`settings` with no more columns than v has."""
    return {**settings, "BLOCK_N": min(settings["BLOCK_N"], width)}


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, d] with contiguous tokens, of any distance."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _each_row(documents: Tensor | None, batch: int) -> Tensor | None:
    return None if documents is None else documents.expand(batch, -1).contiguous()


@triton.jit
def _normalize_kernel(  # type: ignore[no-untyped-def]
    q, k, q_out, k_out, norms, rows, tokens, heads, q_batch, q_token, k_batch, k_token, scale, eps,
    NORMALIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    head = row % heads
    token = (row // heads) % tokens
    batch = row // heads // tokens
    column = tl.arange(0, WIDTH)[None, :]
    at = row[:, None] * WIDTH + column
    q_at = (batch * q_batch + token * q_token + head * WIDTH)[:, None] + column
    k_at = (batch * k_batch + token * k_token + head * WIDTH)[:, None] + column
    x = tl.load(q + q_at, mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(k + k_at, mask=inside[:, None], other=0.0).to(tl.float32)
    q_norm = 1.0 / tl.sqrt(tl.sum(x * x, 1) + eps)
    k_norm = 1.0 / tl.sqrt(tl.sum(y * y, 1) + eps)
    if NORMALIZE:
        x *= q_norm[:, None]
        y *= k_norm[:, None]
    tl.store(q_out + at, (x * scale).to(q_out.dtype.element_ty), mask=inside[:, None])
    tl.store(k_out + at, y.to(k_out.dtype.element_ty), mask=inside[:, None])
    tl.store(norms + row, q_norm, mask=inside)
    tl.store(norms + rows + row, k_norm, mask=inside)


@triton.jit
def _sum_heads_kernel(  # type: ignore[no-untyped-def]
    dq_heads, dk_heads, q, k, norms, dq, dk, rows, scale,
    NORMALIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    column = tl.arange(0, WIDTH)[None, :]
    x = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    y = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for i in tl.static_range(GROUPS):
        at = (row * GROUPS + i)[:, None] * WIDTH + column
        x += tl.load(dq_heads + at, mask=inside[:, None], other=0.0).to(tl.float32)
        y += tl.load(dk_heads + at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = row[:, None] * WIDTH + column
    if NORMALIZE:
        normal = tl.load(q + at, mask=inside[:, None], other=0.0).to(tl.float32) / scale
        x -= normal * tl.sum(x * normal, 1)[:, None]
        x *= tl.load(norms + row, mask=inside, other=0.0)[:, None]
        normal = tl.load(k + at, mask=inside[:, None], other=0.0).to(tl.float32)
        y -= normal * tl.sum(y * normal, 1)[:, None]
        y *= tl.load(norms + rows + row, mask=inside, other=0.0)[:, None]
    tl.store(dq + at, (x * scale).to(dq.dtype.element_ty), mask=inside[:, None])
    tl.store(dk + at, y.to(dk.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _gate(gates, kind, pair, pairs, chunk, chunks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """G, beta, e or f (0 to 3) of a chunk's tokens."""
    return tl.load(gates + ((kind * pairs + pair) * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))


@triton.jit
def _load_tokens(  # type: ignore[no-untyped-def]
    x, first, stride, column, count, CHUNK: tl.constexpr
):
    """Columns of a chunk's first `count` tokens, `stride` apart; the others are zero."""
    i = tl.arange(0, CHUNK)[:, None]
    return tl.load(x + first + i * stride + column[None, :], mask=i < count, other=0.0)


@triton.jit
def _store_tokens(  # type: ignore[no-untyped-def]
    x, first, stride, column, count, value, CHUNK: tl.constexpr
):
    i = tl.arange(0, CHUNK)[:, None]
    at = x + first + i * stride + column[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=i < count)


@triton.jit
def _same_document(  # type: ignore[no-untyped-def]
    documents, batch, chunk, tokens, DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr
):
    i = tl.arange(0, CHUNK)
    if DOCUMENTS:
        each = tl.load(documents + batch * tokens + tl.minimum(chunk * CHUNK + i, tokens - 1))
        return each[:, None] == each[None, :]
    return (i[:, None] >= 0) & (i[None, :] >= 0)


@triton.jit
def _decay(difference, where):  # type: ignore[no-untyped-def]
    """exp(difference), zero elsewhere: no exponent is positive where it counts."""
    return tl.where(where, tl.exp(tl.where(where, difference, 0.0)), 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _inverse_kernel(  # type: ignore[no-untyped-def]
    k, g, beta, documents, gates, inverse, tokens, chunks,
    DOCUMENTS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The gates and T: 32 rows of both diagonal blocks at a time, then the block below them."""
    chunk = tl.program_id(0)
    pair, pairs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, head = pair // HEADS, pair % HEADS
    i = tl.arange(0, CHUNK)
    count = tokens - chunk * CHUNK
    first = batch * tokens + chunk * CHUNK
    step = tl.load(g + (first + i) * HEADS + head, mask=i < count, other=0.0).to(tl.float32)
    rate = tl.load(beta + (first + i) * HEADS + head, mask=i < count, other=0.0).to(tl.float32)
    same = _same_document(documents, batch, chunk, tokens, DOCUMENTS, CHUNK)
    total = tl.sum(tl.where(same & (i[:, None] >= i[None, :]), step[None, :], 0.0), 1)
    rest = tl.sum(tl.where(same & (i[:, None] < i[None, :]), step[None, :], 0.0), 1)
    e, f = tl.exp(total), tl.exp(rest)
    if DOCUMENTS:
        row = documents + batch * tokens
        document = tl.load(row + tl.minimum(chunk * CHUNK + i, tokens - 1))
        before = tl.load(row + tl.maximum(chunk * CHUNK - 1, 0))
        last = tl.load(row + tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1)
        e = tl.where(document == before, e, 0.0)
        f = tl.where(document == last, f, 0.0)
    at = gates + (pair * chunks + chunk) * CHUNK + i
    size = pairs * chunks * CHUNK
    tl.store(at, total)
    tl.store(at + size, rate)
    tl.store(at + 2 * size, e)
    tl.store(at + 3 * size, f)
    key_first = first * (HEADS // GROUPS) * K + head // GROUPS * K
    keys = _load_tokens(k, key_first, HEADS // GROUPS * K, tl.arange(0, K), count, CHUNK)
    a = tl.dot(keys, tl.trans(keys), input_precision="ieee") * rate[:, None]
    a *= _decay(total[:, None] - total[None, :], same & (i[:, None] > i[None, :]))

    half: tl.constexpr = CHUNK // 2
    j = tl.arange(0, half)
    two = tl.arange(0, 2)
    blocks = tl.reshape(a, (2, half, 2, half))
    chosen = (two[:, None] == two[None, :])[:, None, :, None]
    corner = (two[:, None] > two[None, :])[:, None, :, None]
    diagonal = tl.sum(tl.where(chosen, blocks, 0.0), 2)
    below = tl.sum(tl.sum(tl.where(corner, blocks, 0.0), 2), 0)
    solved = tl.where(j[None, :, None] == j[None, None, :], 1.0, tl.zeros_like(diagonal))
    for n in range(half - 1):
        factor = tl.sum(tl.where(j[None, None, :] == n, diagonal, 0.0), 2)
        found = tl.sum(tl.where(j[None, :, None] == n, solved, 0.0), 1)
        solved -= factor[:, :, None] * found[:, None, :]
    upper = tl.sum(tl.where(two[:, None, None] == 0, solved, 0.0), 0)
    lower = tl.sum(tl.where(two[:, None, None] == 1, solved, 0.0), 0)
    below = tl.dot(below, upper, input_precision="ieee")
    below = -tl.dot(lower, below, input_precision="ieee")

    kind = inverse.dtype.element_ty
    out = inverse + (pair * chunks + chunk) * CHUNK * CHUNK
    at = out + j[:, None] * CHUNK + j[None, :]
    tl.store(at, upper.to(kind))
    tl.store(at + half, tl.zeros_like(upper).to(kind))
    tl.store(at + half * CHUNK, below.to(kind))
    tl.store(at + half * CHUNK + half, lower.to(kind))


@triton.jit(do_not_specialize=COUNTS)
def _scan_kernel(  # type: ignore[no-untyped-def]
    k, v, gates, inverse, written, states, tokens, chunks, v_batch, v_token,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens' writes and the chunks' states, for some columns of v."""
    pair, pairs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, head = pair // HEADS, pair % HEADS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_column, i = tl.arange(0, K), tl.arange(0, CHUNK)
    key_stride: tl.constexpr = HEADS // GROUPS * K
    kind = k.dtype.element_ty
    state = tl.zeros((K, BLOCK_N), dtype=tl.float32)
    for chunk in range(chunks):
        count, first = tokens - chunk * CHUNK, batch * tokens + chunk * CHUNK
        index = pair * chunks + chunk
        now = state.to(kind)
        tl.store(states + index * K * V + key_column[:, None] * V + column[None, :], now)
        keys = _load_tokens(
            k, first * key_stride + head // GROUPS * K, key_stride, key_column, count, CHUNK
        )
        v_first = batch * v_batch + (first - batch * tokens) * v_token + head * V
        value = _load_tokens(v, v_first, v_token, column, count, CHUNK).to(tl.float32)
        t = tl.load(inverse + index * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
        rate = _gate(gates, 1, pair, pairs, chunk, chunks, CHUNK)
        e = _gate(gates, 2, pair, pairs, chunk, chunks, CHUNK)
        f = _gate(gates, 3, pair, pairs, chunk, chunks, CHUNK)
        kept = tl.load(gates + ((2 * pairs + pair) * chunks + chunk) * CHUNK + CHUNK - 1)
        value -= e[:, None] * tl.dot(keys, now, input_precision="ieee")
        r = tl.dot(t, (rate[:, None] * value).to(kind), input_precision="ieee")
        _store_tokens(written, (first * HEADS + head) * V, HEADS * V, column, count, r, CHUNK)
        state *= kept
        state = tl.dot(tl.trans(keys), (f[:, None] * r).to(kind), state, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def _output_kernel(  # type: ignore[no-untyped-def]
    q, k, gates, documents, written, states, out, tokens, chunks,
    DOCUMENTS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    pair, pairs = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    batch, head = pair // HEADS, pair % HEADS
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_column, i = tl.arange(0, K), tl.arange(0, CHUNK)
    count, first = tokens - chunk * CHUNK, batch * tokens + chunk * CHUNK
    key_stride: tl.constexpr = HEADS // GROUPS * K
    key_first = first * key_stride + head // GROUPS * K
    queries = _load_tokens(q, key_first, key_stride, key_column, count, CHUNK)
    keys = _load_tokens(k, key_first, key_stride, key_column, count, CHUNK)
    total = _gate(gates, 0, pair, pairs, chunk, chunks, CHUNK)
    e = _gate(gates, 2, pair, pairs, chunk, chunks, CHUNK)
    same = _same_document(documents, batch, chunk, tokens, DOCUMENTS, CHUNK)
    p = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    p *= _decay(total[:, None] - total[None, :], same & (i[:, None] >= i[None, :]))
    state = tl.load(
        states + (pair * chunks + chunk) * K * V + key_column[:, None] * V + column[None, :]
    )
    value = e[:, None] * tl.dot(queries, state, input_precision="ieee")
    value_first = (first * HEADS + head) * V
    r = _load_tokens(written, value_first, HEADS * V, column, count, CHUNK)
    value = tl.dot(p.to(r.dtype), r, value, input_precision="ieee")
    _store_tokens(out, value_first, HEADS * V, column, count, value, CHUNK)


@triton.jit(do_not_specialize=COUNTS)
def _local_kernel(  # type: ignore[no-untyped-def]
    q, k, gates, documents, dout, z, tokens, chunks,
    DOCUMENTS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P^T do, which the scan back turns into z."""
    chunk = tl.program_id(0)
    pair, pairs = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    batch, head = pair // HEADS, pair % HEADS
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_column, i = tl.arange(0, K), tl.arange(0, CHUNK)
    count, first = tokens - chunk * CHUNK, batch * tokens + chunk * CHUNK
    key_stride: tl.constexpr = HEADS // GROUPS * K
    key_first = first * key_stride + head // GROUPS * K
    queries = _load_tokens(q, key_first, key_stride, key_column, count, CHUNK)
    keys = _load_tokens(k, key_first, key_stride, key_column, count, CHUNK)
    total = _gate(gates, 0, pair, pairs, chunk, chunks, CHUNK)
    same = _same_document(documents, batch, chunk, tokens, DOCUMENTS, CHUNK)
    p = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    p *= _decay(total[None, :] - total[:, None], same & (i[:, None] <= i[None, :]))
    value_first = (first * HEADS + head) * V
    do = _load_tokens(dout, value_first, HEADS * V, column, count, CHUNK)
    value = tl.dot(p.to(do.dtype), do, input_precision="ieee")
    _store_tokens(z, value_first, HEADS * V, column, count, value, CHUNK)


@triton.jit(do_not_specialize=COUNTS)
def _scan_backward_kernel(  # type: ignore[no-untyped-def]
    q, k, gates, inverse, dout, z, dstates, tokens, chunks,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z, in place of P^T do, and the gradient of each chunk's last state, for columns of v."""
    pair, pairs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, head = pair // HEADS, pair % HEADS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_column, i = tl.arange(0, K), tl.arange(0, CHUNK)
    key_stride: tl.constexpr = HEADS // GROUPS * K
    kind = k.dtype.element_ty
    state = tl.zeros((K, BLOCK_N), dtype=tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        count, first = tokens - chunk * CHUNK, batch * tokens + chunk * CHUNK
        index = pair * chunks + chunk
        now = state.to(kind)
        tl.store(dstates + index * K * V + key_column[:, None] * V + column[None, :], now)
        key_first = first * key_stride + head // GROUPS * K
        queries = _load_tokens(q, key_first, key_stride, key_column, count, CHUNK)
        keys = _load_tokens(k, key_first, key_stride, key_column, count, CHUNK)
        value_first = (first * HEADS + head) * V
        do = _load_tokens(dout, value_first, HEADS * V, column, count, CHUNK).to(tl.float32)
        value = _load_tokens(z, value_first, HEADS * V, column, count, CHUNK).to(tl.float32)
        t = tl.load(inverse + index * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
        rate = _gate(gates, 1, pair, pairs, chunk, chunks, CHUNK)
        e = _gate(gates, 2, pair, pairs, chunk, chunks, CHUNK)
        f = _gate(gates, 3, pair, pairs, chunk, chunks, CHUNK)
        kept = tl.load(gates + ((2 * pairs + pair) * chunks + chunk) * CHUNK + CHUNK - 1)
        value += f[:, None] * tl.dot(keys, now, input_precision="ieee")
        value = tl.dot(tl.trans(t), value.to(kind), input_precision="ieee")
        _store_tokens(z, value_first, HEADS * V, column, count, value, CHUNK)
        state *= kept
        state = tl.dot(tl.trans(queries), (e[:, None] * do).to(kind), state, input_precision="ieee")
        erased = (-rate * e)[:, None] * value
        state = tl.dot(tl.trans(keys), erased.to(kind), state, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def _grads_kernel(  # type: ignore[no-untyped-def]
    q, k, v, gates, documents, written, states, dout, z, dstates, dq, dk, dv, dg, dbeta,
    tokens, chunks, v_batch, v_token,
    DOCUMENTS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk and a value head, those of q and k before the sum over heads."""
    chunk = tl.program_id(0)
    pair, pairs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, head = pair // HEADS, pair % HEADS
    key_column, i = tl.arange(0, K), tl.arange(0, CHUNK)
    count, first = tokens - chunk * CHUNK, batch * tokens + chunk * CHUNK
    kind = k.dtype.element_ty
    rate = _gate(gates, 1, pair, pairs, chunk, chunks, CHUNK)
    wide = tl.zeros((CHUNK, K), dtype=tl.float32)
    query_grad, read, write = wide, wide, wide
    square = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    x, m, x_turned, m_turned = square, square, square, square
    rate_grad, carried = tl.zeros((CHUNK,), dtype=tl.float32), 0.0
    value_first = (first * HEADS + head) * V
    v_first = batch * v_batch + (first - batch * tokens) * v_token + head * V
    for start in range(0, V, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        do = _load_tokens(dout, value_first, HEADS * V, column, count, CHUNK)
        r = _load_tokens(written, value_first, HEADS * V, column, count, CHUNK)
        adjoint = _load_tokens(z, value_first, HEADS * V, column, count, CHUNK)
        at = (pair * chunks + chunk) * K * V + key_column[:, None] * V + column[None, :]
        state, state_grad = tl.load(states + at), tl.load(dstates + at)
        query_grad = tl.dot(do, tl.trans(state), query_grad, input_precision="ieee")
        read = tl.dot(adjoint, tl.trans(state), read, input_precision="ieee")
        write = tl.dot(r, tl.trans(state_grad), write, input_precision="ieee")
        x = tl.dot(do, tl.trans(r), x, input_precision="ieee")
        m = tl.dot(adjoint, tl.trans(r), m, input_precision="ieee")
        x_turned = tl.dot(r, tl.trans(do), x_turned, input_precision="ieee")
        m_turned = tl.dot(r, tl.trans(adjoint), m_turned, input_precision="ieee")
        carried += tl.sum(tl.sum(state.to(tl.float32) * state_grad.to(tl.float32), 1), 0)
        value = _load_tokens(v, v_first, v_token, column, count, CHUNK).to(tl.float32)
        adjoint = adjoint.to(tl.float32)
        rate_grad += tl.sum(value * adjoint, 1)
        _store_tokens(dv, value_first, HEADS * V, column, count, rate[:, None] * adjoint, CHUNK)
    total = _gate(gates, 0, pair, pairs, chunk, chunks, CHUNK)
    e = _gate(gates, 2, pair, pairs, chunk, chunks, CHUNK)
    f = _gate(gates, 3, pair, pairs, chunk, chunks, CHUNK)
    same = _same_document(documents, batch, chunk, tokens, DOCUMENTS, CHUNK)
    apart = total[:, None] - total[None, :]
    before = i[:, None] > i[None, :]
    decay = _decay(apart, same & (i[:, None] >= i[None, :]))
    x *= decay
    m *= tl.where(before, -decay, 0.0)
    decay = _decay(-apart, same & (i[:, None] <= i[None, :]))
    x_turned *= decay
    m_turned *= tl.where(i[:, None] < i[None, :], -decay * rate[None, :], 0.0)
    key_stride: tl.constexpr = HEADS // GROUPS * K
    key_first = first * key_stride + head // GROUPS * K
    queries = _load_tokens(q, key_first, key_stride, key_column, count, CHUNK)
    keys = _load_tokens(k, key_first, key_stride, key_column, count, CHUNK)
    keys32 = keys.to(tl.float32)
    query_grad, read, write = query_grad * e[:, None], read * -e[:, None], write * f[:, None]
    erased_past = tl.sum(keys32 * read, 1)
    past = tl.sum(queries.to(tl.float32) * query_grad, 1) + rate * erased_past
    stored = tl.sum(keys32 * write, 1)
    pairs = m * tl.dot(keys, tl.trans(keys), input_precision="ieee")
    rate_grad += erased_past + tl.sum(pairs, 1)
    products = x * tl.dot(queries, tl.trans(keys), input_precision="ieee")
    products = tl.where(before, products + rate[:, None] * pairs, 0.0)
    between = tl.cumsum(products, 0, reverse=True)
    step_grad = tl.sum(tl.where(before, between + stored[None, :], past[None, :]), 1)
    step_grad += carried * tl.sum(tl.where(i == CHUNK - 1, e, 0.0), 0)
    query_grad = tl.dot(x.to(kind), keys, query_grad, input_precision="ieee")
    at = (first * HEADS + head) * K
    _store_tokens(dq, at, HEADS * K, key_column, count, query_grad, CHUNK)
    read = tl.dot(m.to(kind), keys, read, input_precision="ieee")
    write = tl.dot(x_turned.to(kind), queries, write, input_precision="ieee")
    write = tl.dot(m_turned.to(kind), keys, write, input_precision="ieee")
    write += rate[:, None] * read
    _store_tokens(dk, at, HEADS * K, key_column, count, write, CHUNK)
    at = (first + i) * HEADS + head
    tl.store(dg + at, step_grad, mask=i < count)
    tl.store(dbeta + at, rate_grad.to(dbeta.dtype.element_ty), mask=i < count)
