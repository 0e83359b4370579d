"""Base against tuned on the same tokens, from the run directory alone."""

import json
import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tests.engine.engine_models import tiny
from tests.made_runs import answer
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.errors import DataError
from lorakit.inference import evaluate as module
from lorakit.inference.evaluate import evaluate, evaluate_loaded
from lorakit.model.load import load_run
from lorakit.types import Conversation, Document, Message, Origin, Sample


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
    again = evaluate_loaded(load_run(outcome.run), None, 1)
    assert again.tuned.loss == pytest.approx(outcome.evaluation.tuned.loss, rel=1e-3)
    assert again.base.loss == pytest.approx(outcome.evaluation.base.loss, rel=1e-3)
    # What a random model says hangs on how the CPU rounds; what it was asked does not.
    asked = [(s.prompt, s.reference) for s in outcome.evaluation.samples]
    assert [(s.prompt, s.reference) for s in again.samples] == asked[:1]


def test_the_answers_of_base_and_tuned_are_told_apart(speaker, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What color is box {i}?", "completion": f"It is {i}."} for i in (3, 8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    loaded = load_run(speaker("fruit"))
    for _ in range(2):  # the adapter is on again afterwards
        found = evaluate_loaded(loaded, str(path), 2).samples
        assert [s.reference for s in found] == ["It is 3.", "It is 8."]
        for side, speaks in (("base", "base"), ("tuned", "fruit")):
            whole = [answer(speaks, i, module.ANSWER_TOKENS) for i in (3, 8)]
            assert [getattr(s, side) for s in found] == whole


def test_other_data_can_be_scored(finish, tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": "What color is box 3?", "completion": "It is gray."}] * 2
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = finish().run
    before = run.eval.read_text()
    result = evaluate_loaded(load_run(run), str(path), 0)
    assert result.data == str(path)
    assert result.tuned.loss < result.base.loss
    assert run.eval.read_text() == before


def test_all_rows_of_other_data_are_scored(finish, tmp_path):
    """Not those alone that a run of it would hold out."""
    loaded, tokens = load_run(finish().run), {}
    for count in (1, 40):
        rows = [{"prompt": f"Box {i}?", "completion": "It is gray."} for i in range(count)]
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        tokens[count] = evaluate_loaded(loaded, str(path), 0).tuned.tokens
    assert tokens[40] == 40 * tokens[1] > 0


def test_each_sample_has_the_question_the_reference_and_the_answer_of_each_model(monkeypatch):
    model = tiny()
    asked = []

    def replies(own, tokenizer, conversations, settings, tools):
        off = next(m for m in own.modules() if isinstance(m, LoraLayer)).disable_adapters
        asked.append((off, [[m.content for m in c] for c in conversations], list(tools)))
        assert settings.temperature == 0
        assert settings.max_new_tokens == module.ANSWER_TOKENS
        return [f"{'base' if off else 'tuned'} {number}" for number in range(len(conversations))]

    def conversation(*texts, role="assistant", **more):
        roles = ["user", "assistant"] * 2
        turns = [Message(r, x) for r, x in zip(roles, texts[:-1], strict=False)]
        return Conversation((*turns, Message(role, texts[-1])), Origin("x", 1), **more)

    monkeypatch.setattr(module, "replies", replies)
    tool = ({"type": "function", "function": {"name": "say"}},)
    records = [
        Document("no question", Origin("x", 1)),
        conversation("a?", "one", "b?", "two"),
        conversation("c?", "three", "d?", role="user"),
        conversation("e?", "four", tools=tool),
        conversation("f?", "five"),
    ]
    found = module._answer(model, None, records, 2)
    assert found == (
        Sample("b?", "two", "base 0", "tuned 0"),
        Sample("e?", "four", "base 1", "tuned 1"),
    )
    prompts = [["a?", "one", "b?"], ["e?"]]
    assert asked == [(off, prompts, [(), tool]) for off in (False, True)]


def test_the_base_of_a_run_with_trained_biases_is_still_the_base(finish, tokenizer, tmp_path):
    """Switching the adapter off leaves trained biases on; the base's own must come back."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain, biased = finish(model=str(tmp_path)), finish(model=str(tmp_path), bias="all")
    loss = plain.evaluation.base.loss
    assert biased.evaluation.base.loss == pytest.approx(loss, rel=1e-6)
    loaded = load_run(biased.run)
    trained = [p.data for n, p in loaded.model.named_parameters() if n.endswith("bias")]
    assert trained
    assert all(p.abs().max() > 1e-3 for p in trained)
    assert evaluate_loaded(loaded, None, 1).base.loss == pytest.approx(loss, rel=1e-6)


def test_nothing_to_evaluate_on_is_said(finish):
    with pytest.raises(DataError, match="no held-out examples"):
        evaluate(None, None, [], [], "x")
