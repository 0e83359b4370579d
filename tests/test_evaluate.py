"""Base against tuned on the same tokens, from the run directory alone."""

import json
import math

import pytest

from lorakit.errors import DataError
from lorakit.evaluate import evaluate, evaluate_loaded
from lorakit.model.load import load_run


def test_the_run_learned_and_eval_json_says_so(finish):
    outcome = finish()
    result = outcome.evaluation
    # A random 64-wide model can only learn which tokens are likely.
    assert result.tuned.loss < result.base.loss - 0.3
    assert result.tuned.tokens == result.base.tokens > 0
    assert result.tuned.perplexity == pytest.approx(math.exp(result.tuned.loss))
    saved = json.loads(outcome.run.eval.read_text())
    assert saved == json.loads(json.dumps(result.as_dict()))
    assert set(saved["base"]) == {"loss", "perplexity", "tokens"}
    assert len(saved["samples"]) == 4


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_reloaded_run_scores_like_the_trained_model(finish, method):
    outcome = finish(method)
    again = evaluate_loaded(load_run(outcome.run), None, 1, print)
    assert again.tuned.loss == pytest.approx(outcome.evaluation.tuned.loss, rel=1e-3)
    assert again.base.loss == pytest.approx(outcome.evaluation.base.loss, rel=1e-3)
    assert again.samples[0].tuned == outcome.evaluation.samples[0].tuned


def test_other_data_can_be_scored(finish, tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": "What color is box 3?", "completion": "It is gray."}] * 2
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = finish().run
    before = run.eval.read_text()
    result = evaluate_loaded(load_run(run), str(path), 0, print)
    assert result.data == str(path)
    assert result.tuned.loss < result.base.loss
    assert run.eval.read_text() == before


def test_the_base_of_a_run_with_trained_biases_is_still_the_base(finish, tiny_model_dir):
    """Switching the adapter off leaves trained biases on; the base's own must come back."""
    plain, biased = finish(), finish(bias="all")
    assert biased.evaluation.base.loss == pytest.approx(plain.evaluation.base.loss, rel=1e-6)


def test_nothing_to_evaluate_on_is_said(finish):
    with pytest.raises(DataError, match="no held-out examples"):
        evaluate(None, None, [], [], "x")
