"""The gated delta rule of Qwen3-Next, Qwen3.5 and OLMo hybrids, and its gradients.

For each head, with a state S [K, V] that starts at zero (arXiv 2412.06464, eq. 10):

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q and k are divided by their norms first, q also by sqrt(K). Chunks of 64 tokens are computed with
matrix products (the WY form of arXiv 2406.06484, section 3.2). In a chunk, with G the cumulative
sum of g, D_ij = exp(G_i - G_j), e_i = exp(G_i) and f_i = exp(G_last - G_i):

    T = (I + A)^-1       A_ij = beta_i (k_i . k_j) D_ij  for i > j
    r = T (beta (v - e (k S)))                     what each token writes
    o = e (q S) + P r    P_ij = (q_i . k_j) D_ij  for i >= j
    S' = e_last S + (f k)^T r                      the next chunk's state

With do, and dS' from the next chunk:

    z = T^T (P^T do + f (k dS'))                   dS = e_last dS' + q^T (e do) - k^T (beta e z)
    dq = e (do S^T) + (D do r^T) k
    dk = beta (-e (z S^T) + M k) + f (r dS'^T) + (D do r^T)^T q + (beta M)^T k
         M_ij = -D_ij (z_i . r_j)  for i > j
    dv = beta z                                    dbeta = v . z + k . (-e (z S^T) + M k)
    dg_t = sum of W_ij for i >= t > j
         + sum of e_i (q_i . (do_i S^T) - beta_i k_i . (z_i S^T)) for i >= t
         + sum of f_j k_j . (r_j dS'^T) for j < t  + e_last S . dS'
         W_ij = D_ij (q_i . k_j) (do_i . r_j) + beta_i M_ij (k_i . k_j) for i > j

Only chunks are sequential, in one kernel each way; all else is parallel over chunks. `documents`
numbers the documents of a packed row. G is summed within a document, and D, e and f are zero
between documents: values and gradients of other documents are exactly zero, no exponent is
positive, and shapes depend on the number of tokens alone, as CUDA graphs need.

Shapes: q, k [B, T, Hk, K]; v, o [B, T, H, V]; g, beta [B, T, H]; documents int32 [B, T], not
decreasing. H is a multiple of Hk: consecutive value heads share a key head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.backend import has_matrix_kernels
from lorakit.ops.delta_rule_layout import CHUNK, EPS, DeltaRuleSaved, empty_saved, wide_dtype

# Of heads. A wider state does not fit in registers; some kernels of narrow and wide heads together
# are miscompiled for Hopper by ptxas 12.8, which Triton 3.6 brings.
WIDTHS = (64, 128)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The outputs o, differentiable by q, k, v, g and beta."""
    return _forward_op(q, k, v, g, beta, documents, normalize)[0]


def uses_delta_kernels(k: Tensor, v: Tensor) -> bool:
    """True if Triton kernels compute tensors of this device, dtype and width."""
    widths = k.shape[-1] in WIDTHS and v.shape[-1] in WIDTHS
    return widths and v.dtype in (torch.bfloat16, torch.float16) and has_matrix_kernels(v)


@torch.library.custom_op(
    "lorakit::gated_delta_rule",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? documents, "
    "bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, ...]:
    if uses_delta_kernels(k, v):
        from lorakit.ops.gated_delta_rule_triton import delta_rule_triton

        out, saved = delta_rule_triton(q, k, v, g, beta, documents, normalize)
    else:
        out, saved = delta_rule_reference(q, k, v, g, beta, documents, normalize)
    return (out, *saved)


@torch.library.custom_op(
    "lorakit::gated_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor v, Tensor beta, Tensor? documents, bool normalize, "
    "Tensor[] saved) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    dout: Tensor,
    v: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
    saved: list[Tensor],
) -> tuple[Tensor, ...]:
    given = (dout, v, beta, documents, normalize, DeltaRuleSaved(*saved))
    if uses_delta_kernels(saved[1], v):
        from lorakit.ops.gated_delta_rule_triton import delta_rule_backward_triton

        return delta_rule_backward_triton(*given)
    return delta_rule_backward_reference(*given)


@_forward_op.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, ...]:
    return (v.new_empty(v.shape), *empty_saved(q, v))


@_backward_op.register_fake
def _backward_shapes(
    dout: Tensor,
    v: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
    saved: list[Tensor],
) -> tuple[Tensor, ...]:
    key, gates = saved[1], saved[3]
    dg = beta.new_empty(beta.shape, dtype=gates.dtype)
    return (
        *(key.new_empty(key.shape) for _ in "qk"), v.new_empty(v.shape), dg,
        beta.new_empty(beta.shape),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _q, _k, v, g, beta, documents, normalize = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(v, beta, documents, *output[1:])
    ctx.normalize, ctx.g_dtype = normalize, g.dtype


def _backward(ctx: Any, dout: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    v, beta, documents, *saved = ctx.saved_tensors
    dq, dk, dv, dg, dbeta = _backward_op(dout, v, beta, documents, ctx.normalize, saved)
    return dq, dk, dv, dg.to(ctx.g_dtype), dbeta, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, DeltaRuleSaved]:
    """The definition: (o, saved)."""
    wide, kind, groups = wide_dtype(v.dtype), v.dtype, v.shape[2] // k.shape[2]
    queries, keys = q.to(wide), k.to(wide)
    norms = torch.stack([t.pow(2).sum(-1).add(EPS).rsqrt() for t in (queries, keys)])
    if normalize:
        queries, keys = queries * norms[0, ..., None], keys * norms[1, ..., None]
    queries = queries * q.shape[-1] ** -0.5
    gates, apart = _gates(g.to(wide), beta.to(wide), documents)
    total, rate, e, f = gates.unflatten(-1, (-1, CHUNK)).unsqueeze(-1)
    decay = _decay(total, apart)
    qc, kc, vc = _chunks(queries, groups), _chunks(keys, groups), _chunks(v.to(wide))
    a = (rate * (kc @ kc.mT) * decay).tril(-1)
    identity = torch.eye(CHUNK, dtype=wide, device=v.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
    u, w = inverse @ (rate * vc), inverse @ (rate * e * kc)
    fk = (f * kc).mT
    state = torch.zeros_like(fk[:, :, 0] @ vc[:, :, 0])
    states, written = [], []
    for i in range(a.shape[2]):
        states.append(state)
        written.append(u[:, :, i] - w[:, :, i] @ state)
        state = e[:, :, i, -1:] * state + fk[:, :, i] @ written[-1]
    r, s = torch.stack(written, 2), torch.stack(states, 2)
    out = e * (qc @ s) + ((qc @ kc.mT) * decay) @ r
    tokens = v.shape[1]
    saved = DeltaRuleSaved(
        queries.to(kind), keys.to(kind, copy=True), norms, gates, inverse.to(kind).contiguous(),
        _tokens(r, tokens).to(kind), s.to(kind),
    )  # fmt: skip
    return _tokens(out, tokens).to(kind), saved


def delta_rule_backward_reference(
    dout: Tensor,
    v: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    normalize: bool,
    saved: DeltaRuleSaved,
) -> tuple[Tensor, ...]:
    """The definition: gradients of q, k, v, g and beta; that of g in the dtype of sums."""
    wide, groups, tokens = saved.gates.dtype, v.shape[2] // saved.k.shape[2], v.shape[1]
    total, rate, e, f = saved.gates.unflatten(-1, (-1, CHUNK)).unsqueeze(-1)
    decay = _decay(total, _apart(documents, v.device))
    q, k = (_chunks(t.to(wide), groups) for t in (saved.q, saved.k))
    do, vc, r = (_chunks(t.to(wide)) for t in (dout, v, saved.written))
    s, turned = saved.states.to(wide), saved.inverse.to(wide).mT
    local = ((k @ q.mT) * decay.mT) @ do
    reads = q.mT @ (e * do)
    fk, erased = f * k, (rate * e * k).mT
    dstate = torch.zeros_like(s[:, :, 0])
    dstates: list[Tensor] = []
    adjoints: list[Tensor] = []
    for i in reversed(range(s.shape[2])):
        dstates.insert(0, dstate)
        z = turned[:, :, i] @ (local[:, :, i] + fk[:, :, i] @ dstate)
        adjoints.insert(0, z)
        dstate = e[:, :, i, -1:] * dstate + reads[:, :, i] - erased[:, :, i] @ z
    z, ds = torch.stack(adjoints, 2), torch.stack(dstates, 2)
    x, m = (do @ r.mT) * decay, -((z @ r.mT) * decay).tril(-1)
    same_keys = m * (k @ k.mT)
    past, kept = e * (do @ s.mT), f * (r @ ds.mT)
    read = -e * (z @ s.mT)
    erased_past = (k * read).sum(-1)
    dbeta = (vc * z).sum(-1) + erased_past + same_keys.sum(-1)
    # By pairs of tokens: a difference of sums would leave rounding where the decay is strong.
    pairs = (x * (q @ k.mT)).tril(-1) + rate * same_keys
    dg = pairs.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)
    dg += ((q * past).sum(-1) + rate[..., 0] * erased_past).flip(-1).cumsum(-1).flip(-1)
    stored = (k * kept).sum(-1)
    dg += stored.cumsum(-1) - stored
    dg += e[..., -1, :] * (s * ds).sum((-1, -2)).unsqueeze(-1)
    dq = past + x @ k
    read, write = rate * (read + m @ k), kept + x.mT @ q + (rate * m).mT @ k
    dq, dk = (_tokens(t, tokens).unflatten(2, (-1, groups)).sum(3) for t in (dq, read + write))
    queries, keys = saved.q.to(wide), saved.k.to(wide)
    scale = q.shape[-1] ** -0.5
    if normalize:
        dq = dq - queries * (dq * queries).sum(-1, keepdim=True) / scale**2
        dq = dq * saved.norms[0, ..., None]
        dk = dk - keys * (dk * keys).sum(-1, keepdim=True)
        dk = dk * saved.norms[1, ..., None]
    return (
        (scale * dq).to(v.dtype), dk.to(v.dtype), _tokens(rate * z, tokens).to(v.dtype),
        _tokens(dg, tokens), _tokens(dbeta, tokens).to(beta.dtype),
    )  # fmt: skip


def _chunks(x: Tensor, groups: int = 1) -> Tensor:
    """[B, T, H, ...] as [B, H * groups, chunks, 64, ...], padded with zeros."""
    x = x.transpose(1, 2)
    padding = -x.shape[2] % CHUNK
    x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, padding))
    return x.unflatten(2, (-1, CHUNK)).repeat_interleave(groups, 1)


def _tokens(x: Tensor, tokens: int) -> Tensor:
    """Undo `_chunks`."""
    return x.flatten(2, 3)[:, :, :tokens].transpose(1, 2).contiguous()


def _documents(documents: Tensor) -> Tensor:
    """Documents [B, chunks, 64]; padding belongs to the last."""
    last = documents[:, -1:].expand(-1, -documents.shape[1] % CHUNK)
    return torch.cat([documents, last], 1).unflatten(1, (-1, CHUNK))


def _apart(documents: Tensor | None, device: torch.device) -> Tensor:
    """True where two tokens of a chunk are in different documents [B, 1, chunks, 64, 64]."""
    if documents is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    each = _documents(documents).unsqueeze(1)
    return each.unsqueeze(-1) != each.unsqueeze(-2)


def _decay(total: Tensor, apart: Tensor) -> Tensor:
    """D, which is zero above the diagonal and between documents."""
    difference = (total - total.mT).masked_fill(apart, float("-inf"))
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).triu(1)
    return difference.masked_fill(upper, float("-inf")).exp()


def _gates(g: Tensor, beta: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """(`DeltaRuleSaved.gates`, `_apart`)."""
    gc, rate = _chunks(g), _chunks(beta)
    apart = _apart(documents, g.device)
    square = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device)
    total = ((square.tril() & ~apart) * gc.unsqueeze(-2)).sum(-1)
    rest = ((square.triu(1) & ~apart) * gc.unsqueeze(-2)).sum(-1)
    e, f = total.exp(), rest.exp()
    if documents is not None:
        each = _documents(documents)
        before = torch.cat([each[:, :1, 0], each[:, :-1, -1]], 1)
        e = e * (each == before.unsqueeze(-1)).unsqueeze(1)
        f = f * ~apart[..., -1]
    return torch.stack([t.flatten(2) for t in (total, rate, e, f)]), apart
