"""Our model gives lm-eval the same requests and answers as lm-eval's own model class."""

import copy

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from lorakit.evaluation.harness_model import HarnessModel
from lorakit.evaluation.model_side import ModelSide
from lorakit.inference.generate import base_answers
from lorakit.model.load import load_run


@pytest.fixture(scope="module")
def loaded(finish):
    """A run whose adapter changes much: its answers differ from the base's."""
    return load_run(finish(max_steps=12).run)


def run(lm, manager, names):
    tasks = manager.load(names)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found = evaluate(
        lm=lm,
        task_dict=tasks,
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return found["samples"]


def test_scores_and_requests_are_those_of_lm_evals_own_model(loaded, manager):
    names = ["boxes", "boxes_shots", "colors"]
    ours = run(HarnessModel(ModelSide(loaded.model, loaded.tokenizer)), manager, names)
    own = run(HFLM(pretrained=merged(loaded), tokenizer=loaded.tokenizer), manager, names)
    for name in names:
        assert len(ours[name]) == len(own[name]) >= 5
        for one, other in zip(ours[name], own[name], strict=True):
            assert one["arguments"] == other["arguments"]
            assert {m: one[m] for m in one["metrics"]} == {m: other[m] for m in other["metrics"]}
            if name == "colors":
                values = [float(r[0][0]) for r in one["resps"]]
                assert values == pytest.approx([float(r[0][0]) for r in other["resps"]], abs=1e-3)
            else:
                assert one["resps"] == other["resps"]


def merged(loaded):
    return copy.deepcopy(loaded.model).merge_and_unload()


def test_the_base_is_asked_with_the_adapter_off(loaded, manager):
    lm = lambda: HarnessModel(ModelSide(loaded.model, loaded.tokenizer))  # noqa: E731
    tuned = run(lm(), manager, ["colors"])["colors"]
    with base_answers(loaded.model):
        base = run(lm(), manager, ["colors"])["colors"]
    assert [s["resps"] for s in base] != [s["resps"] for s in tuned]


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(loaded, monkeypatch):
    own = HFLM(pretrained=merged(loaded), tokenizer=loaded.tokenizer, max_length=16)
    monkeypatch.setattr(ModelSide, "context", 16)
    ours = HarnessModel(ModelSide(loaded.model, loaded.tokenizer))
    texts = ["A short text.", "A text that is longer than the context. " * 5]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), i, ("t", i, 1))
        for i, text in enumerate(texts)
    ]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        own.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4
    )


def test_an_open_turn_and_a_refused_system_turn(loaded):
    lm = HarnessModel(ModelSide(loaded.model, loaded.tokenizer))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So,"}]
    assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("So,")
    assert "So," not in lm.apply_chat_template(turns[:1])


def test_settings_of_generation(loaded):
    lm = HarnessModel(ModelSide(loaded.model, loaded.tokenizer))
    settings, until = lm._settings({"until": ["\n\n"], "max_gen_toks": 7})
    assert (settings.max_new_tokens, settings.temperature) == (7, 0.0)
    assert until == ["\n\n", loaded.tokenizer.eos_token]
    settings, _ = lm._settings({"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 0)
