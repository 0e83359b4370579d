"""Sampling: the distribution, the record of log p, and independence of batches and of dropout."""

import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.errors import WorkError
from lorakit.reinforcement import rollouts
from lorakit.reinforcement.rollouts import (
    Sampler,
    SamplingSettings,
    _Draw,
    inverse_cdf,
    uniform_draws,
)

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7, 10, 11]]


class Words:
    """As much of a tokenizer as the sampler reads."""

    pad_token_id = None
    eos_token_id = 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=2,
        attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def sampler(model, monkeypatch):
    monkeypatch.setattr(rollouts, "stop_token_ids", lambda tokenizer, config: [2])
    monkeypatch.setattr(
        rollouts, "generation_arguments",
        lambda model, tokenizer, settings: {
            "max_new_tokens": settings.max_new_tokens, "do_sample": False, "eos_token_id": [2],
            "pad_token_id": 2,
        },
    )  # fmt: skip

    def make(rows=8, **settings):
        notes = []
        made = Sampler(
            model, Words(), SamplingSettings(6, **settings), notes.append, rows,
            contextlib.nullcontext,
        )  # fmt: skip
        made.notes = notes
        return made

    return make


def test_log_p_is_that_of_the_model(model, sampler):
    settings = {"temperature": 0.7}
    found = sampler(**settings).sample(PROMPTS, uniform_draws(0, 0, 3, 6))
    model.eval()
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt + completion.ids])
        log_p = (model(ids).logits[0].float() / 0.7).log_softmax(-1)
        expected = [log_p[len(prompt) - 1 + i, t].item() for i, t in enumerate(completion.ids)]
        assert completion.log_probs == pytest.approx(expected, abs=1e-5)
        assert completion.truncated == (completion.ids[-1] != 2)
        assert 2 not in completion.ids[:-1]
        assert 0 < completion.entropy < 3.7


def test_draws_do_not_depend_on_the_batch_or_on_the_generator(model, sampler):
    draws = uniform_draws(3, 1, 3, 6)
    together = sampler().sample(PROMPTS, draws)
    torch.manual_seed(99)
    model.train()
    alone = sampler(rows=1).sample(PROMPTS, draws)
    assert [c.ids for c in alone] == [c.ids for c in together]
    assert model.training
    assert torch.equal(torch.rand(1), torch.manual_seed(99) and torch.rand(1))


def test_another_rollout_draws_otherwise():
    assert torch.equal(uniform_draws(1, 2, 4, 5), uniform_draws(1, 2, 4, 5))
    assert not torch.equal(uniform_draws(1, 2, 4, 5), uniform_draws(1, 3, 4, 5))
    assert not torch.equal(uniform_draws(2, 2, 4, 5), uniform_draws(1, 2, 4, 5))


def test_samples_have_the_distribution_of_the_policy():
    weights = torch.tensor([0.5, 0.0, 0.2, 0.3]).expand(4000, 4)
    draws = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)).double()
    share = torch.bincount(inverse_cdf(weights, draws).squeeze(1), minlength=4) / 4000
    torch.testing.assert_close(share, weights[0], atol=0.03, rtol=0)
    assert share[1] == 0


def test_no_token_without_probability_is_drawn_at_the_borders():
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert inverse_cdf(weights, torch.zeros(1, 1).double()).item() == 1
    assert inverse_cdf(weights, torch.full((1, 1), 1 - 2**-24).double()).item() == 2


def test_top_k_and_top_p():
    p = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    kept = _Draw(torch.zeros(1, 1), SamplingSettings(1, top_k=2))._allowed(p)
    assert (kept > 0).tolist() == [[False, True, True, False]]
    kept = _Draw(torch.zeros(1, 1), SamplingSettings(1, top_p=0.6))._allowed(p)
    assert (kept > 0).tolist() == [[False, True, True, False]]
    kept = _Draw(torch.zeros(1, 1), SamplingSettings(1, top_p=0.3))._allowed(p)
    assert (kept > 0).tolist() == [[False, True, False, False]]


def test_memory_that_runs_out_halves_the_batch(sampler, monkeypatch):
    made = sampler(rows=4)
    draws = uniform_draws(0, 0, 3, 6)
    expected, real = made.sample(PROMPTS, draws), made._batch

    def limited(batch):
        if len(batch.prompts) > 1:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
        return real(batch)

    monkeypatch.setattr(made, "_batch", limited)
    assert [c.ids for c in made.sample(PROMPTS, draws)] == [c.ids for c in expected]
    assert made.rows == 1
    assert "all further rollouts sample 1 completions at once" in made.notes[-1]


def test_one_completion_without_memory_is_one_message(sampler, monkeypatch):
    made = sampler()

    def fails(batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(made, "_batch", fails)
    with pytest.raises(WorkError, match="sampling one completion of 6 tokens"):
        made.sample(PROMPTS[:1], uniform_draws(0, 0, 1, 6))
