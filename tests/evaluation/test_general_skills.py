"""The shipped questions have one right option each, and a model that forgets scores lower."""

import pytest
import torch

from lorakit.evaluation.general_skills import GeneralSkills, general_questions
from lorakit.evaluation.model_side import ModelSide


def test_questions_are_complete():
    questions = general_questions()
    assert len(questions) >= 40
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert 2 <= len(question.options) <= 3
        assert len(set(question.options)) == len(question.options)


class Knows(ModelSide):
    """A side that prefers the first option of each question, or none."""

    def __init__(self, tokenizer, prefers):
        self.tokenizer, self.prefers = tokenizer, prefers

    def loglikelihoods(self, pairs):
        firsts = [i for i, (prompt, _) in enumerate(pairs) if prompt != pairs[i - 1][0]]
        good = firsts if self.prefers else []
        return [(-1.0 if i in good else -3.0, False) for i in range(len(pairs))]


def test_the_option_with_the_highest_likelihood_counts(tokenizer):
    task = GeneralSkills()
    accuracy, probability = task.run(Knows(tokenizer, True))
    assert accuracy.summary() == 1.0
    assert probability.summary() > 0.6
    # All options alike: no question is answered.
    accuracy, probability = task.run(Knows(tokenizer, False))
    assert accuracy.summary() == 0.0
    assert probability.summary() == pytest.approx(0.35, abs=0.03)


@pytest.mark.slow
def test_a_real_small_model_knows_most_and_a_spoiled_one_forgets(demo_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    task = GeneralSkills(24)
    right, before = task.run(ModelSide(model, tokenizer))
    assert right.summary() >= 0.5
    with torch.no_grad():
        for layer in model.model.layers[10:20]:
            layer.mlp.down_proj.weight.zero_()
    _, after = task.run(ModelSide(model, tokenizer))
    assert after.summary() < before.summary() - 0.1
