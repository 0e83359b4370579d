"""Held-out loss weighs tokens, not batches, and leaves the model as it was."""

import math

import pytest
import torch

from lorakit.records import IGNORE, Example, Origin
from lorakit.train.score import score


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
