"""The chunked gated delta rule and its gradients equal the recurrence, in float64."""

import pytest
import torch
from torch import Tensor

from lorakit.ops.gated_delta_rule import EPS, gated_delta_rule

NAMES = ("q", "k", "v", "g", "beta")


def recurrence(q, k, v, g, beta, documents=None, normalize=True):
    """The definition, token by token."""
    groups = v.shape[2] // k.shape[2]
    if normalize:
        q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + EPS) for t in (q, k))
    q, k = (t.repeat_interleave(groups, 2) for t in (q, k))
    state = torch.zeros(*v.shape[:1], v.shape[2], k.shape[3], v.shape[3], dtype=v.dtype)
    out = []
    for t in range(v.shape[1]):
        if t and documents is not None:
            state = state * (documents[:, t] == documents[:, t - 1]).view(-1, 1, 1, 1)
        state = state * g[:, t].exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        written = beta[:, t].unsqueeze(-1) * (v[:, t] - known)
        state = state + k[:, t].unsqueeze(-1) * written.unsqueeze(-2)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def inputs(tokens, heads=(2, 4), widths=(16, 32), batch=2, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(tokens)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (make(batch, tokens, heads[0], widths[0]) for _ in "qk")
    v, beta = make(batch, tokens, heads[1], widths[1]), make(batch, tokens, heads[1]).sigmoid()
    g = -torch.nn.functional.softplus(make(batch, tokens, heads[1]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(device, wide if t is g else dtype) for t in (q, k, v, g, beta)]


def numbered(lengths, batch=1):
    """Documents of these lengths, the same in each row."""
    each = torch.arange(len(lengths), dtype=torch.int32)
    return each.repeat_interleave(torch.tensor(lengths)).repeat(batch, 1)


def results(function, given, *more, weight=None):
    """(o, and the gradients of all inputs of a weighted sum)."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    out = function(*leaves, *more)
    if weight is None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(weight.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found, expected, limit=1e-9):
    for name, ours, theirs in zip(("o", *NAMES), found, expected, strict=True):
        apart = float((ours.double() - theirs.double()).norm())
        assert (
            apart <= limit * float(theirs.double().norm()) + 1e-2 * limit * ours.numel() ** 0.5
        ), name
        assert ours.shape == theirs.shape, name


@pytest.mark.parametrize("tokens", [1, 64, 65, 150])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_chunks_equal_the_recurrence(tokens, normalize):
    given = inputs(tokens)
    if not normalize:
        given[1] /= given[1].norm(dim=-1, keepdim=True)
    found = results(gated_delta_rule, given, None, normalize)
    assert_same(found, results(recurrence, given, None, normalize))


@pytest.mark.parametrize("lengths", [(3, 1, 60, 70), (64, 64), (1, 63, 1), (10, 2, 5), (130, 20)])
def test_documents_equal_the_recurrence(lengths):
    documents = numbered(lengths, batch=2)
    given = inputs(sum(lengths))
    assert_same(results(gated_delta_rule, given, documents), results(recurrence, given, documents))


@pytest.mark.parametrize("g", [0.0, -1e-4, -20.0, -200.0])
def test_strong_and_no_decay(g):
    given = inputs(140)
    given[3] = torch.full_like(given[3], g)
    assert_same(results(gated_delta_rule, given), results(recurrence, given))


def test_decay_that_jumps_does_not_cancel():
    """A cumulative sum of a thousand has no room for small steps in float32."""
    given = inputs(64)
    given[3][:, ::2], given[3][:, 1::2] = -30.0, -1e-3
    expected = results(recurrence, given)
    found = results(gated_delta_rule, [t.float() for t in given])
    assert_same(found, expected, 2e-4)


def test_equal_keys_with_beta_near_one():
    """Powers of A grow to 1e18 here, and a sum of them would leave nothing."""
    given = inputs(128)
    given[1] = given[1][:, :1].expand_as(given[1]).contiguous()
    given[3].fill_(-1e-3)
    given[4].fill_(0.999)
    assert_same(results(gated_delta_rule, given), results(recurrence, given), 1e-8)
    found = results(gated_delta_rule, [t.float() for t in given])
    assert all(t.isfinite().all() for t in found)
    assert_same(found, results(recurrence, given), 1e-3)


def test_other_documents_have_exactly_no_part():
    lengths = (30, 50, 3, 70)
    documents = numbered(lengths)
    given = inputs(sum(lengths), batch=1)
    weight = torch.zeros(1, sum(lengths), 4, 32, dtype=torch.float64)
    weight[:, 30:80] = 1.0
    _, *gradients = results(gated_delta_rule, given, documents, weight=weight)
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert gradient[:, 30:80].any(), name
        assert not gradient[:, :30].any(), name
        assert not gradient[:, 80:].any(), name
    changed = [
        torch.where((documents == 1).view(1, -1, *[1] * (t.dim() - 2)), t, -9.0) for t in given
    ]
    changed[3] = torch.where((documents == 1).unsqueeze(-1), given[3], -7.7)
    same = gated_delta_rule(*changed, documents)[:, 30:80]
    assert torch.equal(same, gated_delta_rule(*given, documents)[:, 30:80])


def test_the_recurrence_is_that_of_transformers():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    given = inputs(100, dtype=torch.float32)
    q, k = (t.repeat_interleave(2, 2) for t in given[:2])
    ours = gated_delta_rule(*given)
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        bound = getattr(qwen, name)
        plain = getattr(bound, "plain", None) or bound.__wrapped__
        g, beta = given[3:]
        theirs, _ = plain(q, k, given[2], g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compile_keeps_it_as_one_operation_each_way():
    given = inputs(70, batch=1, dtype=torch.float32)
    documents = numbered((30, 40))

    def layer(q, k, v, g, beta):
        return gated_delta_rule(q * 2.0, k, v, -g.exp(), beta.sigmoid(), documents).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, given), results(layer, given), strict=True):
        torch.testing.assert_close(found, expected)


def test_shapes_without_data_are_those_with_data():
    """torch's own check of the fake implementations and of autograd's registration."""
    given = [t.requires_grad_() for t in inputs(70, batch=1, dtype=torch.float32)]
    operation = torch.ops.lorakit.gated_delta_rule.default
    torch.library.opcheck(operation, (*given, numbered((30, 40)), True))
