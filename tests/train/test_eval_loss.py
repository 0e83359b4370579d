"""Held-out loss weighs tokens, not batches, and leaves the model as it was."""

import math

import pytest
import torch

from lorakit.errors import WorkError
from lorakit.train.eval_loss import combined, not_finite, score
from lorakit.train.loss import attach_loss, detach_loss
from lorakit.types import IGNORE, EvalScore, Example, Origin

from .faults import ask_for_a_petabyte, nan_where


def rows():
    made = []
    for i, length in enumerate([4, 19, 7, 3, 11]):
        ids = torch.randint(3, 900, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        made.append(Example(ids, [IGNORE, IGNORE, *ids[2:]], Origin("x", i)))
    return made


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_score_is_the_mean_over_all_trained_tokens(model, batch_tokens):
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows():
            log_p = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for i, label in enumerate(row.labels):
                if label != IGNORE:
                    loss -= log_p[i - 1, label].item()
                    tokens += 1
    model.train()
    result = score(model, rows(), pad_id=0, batch_tokens=batch_tokens)
    assert result.tokens == tokens == sum(r.trained_tokens for r in rows())
    assert result.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert model.training
    assert "forward" not in model.__dict__


def test_scores_of_parts_are_weighed_by_their_tokens():
    parts = [EvalScore(1.0, math.e, 30), EvalScore(4.0, math.exp(4), 10), EvalScore(0.0, 1.0, 0)]
    whole = combined(parts)
    assert (whole.loss, whole.tokens) == (1.75, 40)
    assert whole.perplexity == pytest.approx(math.exp(1.75))
    assert combined(parts[1:2]) == parts[1]
    nothing = combined([EvalScore(0.0, 1.0, 0)] * 2)
    assert (nothing.loss, nothing.perplexity, nothing.tokens) == (0.0, 1.0, 0)


def test_a_loss_beyond_all_measure_has_a_perplexity_too():
    assert combined([EvalScore(5000.0, 1.0, 3)] * 2).perplexity == math.exp(700)


def test_a_model_in_training_keeps_the_loss_it_trains_with(model):
    attach_loss(model)
    try:
        before = model.__dict__["forward"]
        score(model, rows(), pad_id=0)
        assert not_finite(model, rows(), pad_id=0) == []
        assert model.__dict__["forward"] is before
    finally:
        detach_loss(model)


def memory_for(model, tokens):
    """Let the model run out of memory above so many tokens at once."""

    def hook(module, args, kwargs):
        if kwargs["input_ids"].numel() > tokens:
            ask_for_a_petabyte()

    return model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def test_memory_that_ends_makes_smaller_batches_of_the_same_score(model):
    whole, told = score(model, rows(), pad_id=0), []
    hook = memory_for(model, 20)
    try:
        cut = score(model, rows(), pad_id=0, on_smaller=told.append)
        assert cut.tokens == whole.tokens
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        # Five of 19 tokens at once, then two, then one.
        assert told == [38, 19]
        hook.remove()
        hook = memory_for(model, 18)
        with pytest.raises(WorkError, match=r"scoring x:1 alone \(19 tokens\): .* requested"):
            score(model, rows(), pad_id=0)
    finally:
        hook.remove()


def test_rows_that_are_not_finite_are_found_one_by_one(model):
    made = rows()
    poisoned = [made[1], made[4]]
    hook = nan_where(model, [poisoned[0].input_ids[7], poisoned[1].input_ids[3]])
    model.train()
    try:
        assert not_finite(model, made, pad_id=0) == poisoned
    finally:
        hook.remove()
    assert model.training
    assert not_finite(model, made, pad_id=0) == []
