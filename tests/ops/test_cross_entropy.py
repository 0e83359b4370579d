"""Chunked loss equals its definition, value and gradient, for odd sizes and any budget."""

import pytest
import torch

from lorakit.ops.cross_entropy import reference, summed_cross_entropy, token_cross_entropy


def head_of(vocabulary, width, dtype):
    torch.manual_seed(1)
    return torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype)


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 3, 2), (7, 11, 5), (64, 129, 33)])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_value_and_gradients_equal_the_definition_in_float64(
    tokens, vocabulary, width, rows_per_chunk
):
    torch.manual_seed(0)
    head = head_of(vocabulary, width, torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,))
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    grads, losses = [], []
    for fast in (False, True):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        if fast:
            loss = summed_cross_entropy(h, targets, head, 4 * head.out_features * rows_per_chunk)
        else:
            loss = torch.nn.functional.cross_entropy(head(h), targets, reduction="sum")
        loss.double().backward()
        losses.append(loss.item())
        grads.append((h.grad, head.weight.grad.clone()))
    # Logits are taken to float32 on purpose: the tolerance is float32's.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for ours, definition in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-5, atol=1e-6)


class FrozenHead(torch.nn.Linear):
    """A head that is its product alone, as `SupervisedHead` says of a frozen output embedding."""

    @property
    def frozen_weight(self):
        return self.weight.data


def thirteen_tokens(frozen):
    """Hidden states, targets and head: each of 11 ids is a target, rows 4 and 12 are padding."""
    torch.manual_seed(0)
    vocabulary, width = 11, 6
    kind = FrozenHead if frozen else torch.nn.Linear
    head = kind(width, vocabulary, bias=False).requires_grad_(not frozen)
    targets = torch.arange(13) % vocabulary
    targets[4] = targets[12] = -100
    hidden = torch.randn(13, width, requires_grad=True)
    return hidden, targets, head


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 13, 1000])
def test_each_chunk_has_its_own_gradient_for_every_token_id(frozen, rows_per_chunk):
    """Every id of the vocabulary is a target, 0 too; two rows are padding and have no gradient."""
    hidden, targets, head = thirteen_tokens(frozen)
    found = summed_cross_entropy(hidden, targets, head, 4 * head.out_features * rows_per_chunk)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(found, expected)
    wanted = [hidden] if frozen else [hidden, head.weight]
    ours, theirs = (torch.autograd.grad(3.0 * loss, wanted) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert not ours[0][[4, 12]].any()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 13, 1000])
def test_any_function_of_token_losses_has_its_exact_gradient(frozen, rows_per_chunk):
    """Each token has another derivative, as in DPO; padded targets have loss and gradient 0."""
    hidden, targets, head = thirteen_tokens(frozen)
    found = token_cross_entropy(hidden, targets, head, 4 * head.out_features * rows_per_chunk)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    assert not found[[4, 12]].any()
    wanted = [hidden] if frozen else [hidden, head.weight]
    ours, theirs = (
        torch.autograd.grad(torch.sigmoid(losses[:6].sum() - losses[6:].sum()), wanted)
        for losses in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_bf16_error_is_that_of_bf16_inputs():
    torch.manual_seed(0)
    head = head_of(97, 32, torch.bfloat16)
    hidden, targets = torch.randn(50, 32), torch.randint(0, 97, (50,))
    exact = torch.nn.functional.cross_entropy(
        hidden.bfloat16().double() @ head.weight.double().T, targets, reduction="sum"
    )
    ours = summed_cross_entropy(hidden.bfloat16(), targets, head, 4 * 97 * 16)
    assert ours.dtype == torch.float32
    # bf16 logits carry 8 bits: a relative error of 2^-9 each, averaged over 50 tokens.
    assert ours.item() == pytest.approx(exact.item(), rel=2**-9)


def test_no_tokens_give_zero_and_a_zero_gradient():
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = summed_cross_entropy(
        hidden, torch.zeros(0, dtype=torch.long), head_of(5, 4, torch.float32)
    )
    loss.backward()
    assert loss.item() == 0.0
    none = token_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), torch.nn.Identity())
    assert none.shape == (0,)


def test_reference_is_the_sum_of_negative_log_probabilities():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    loss = reference(logits, torch.tensor([0, 1]), torch.nn.Identity())
    expected = torch.log(torch.tensor(2.0)) + torch.log(
        torch.tensor(1.0) + torch.exp(torch.tensor(2.0))
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
