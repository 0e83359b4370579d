"""Examples of a rollout: which completions are trained, with which numbers."""

import json

import pytest

from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.policy_loss import ADVANTAGE, COMPLETION, OLD, REFERENCE, SAMPLER, WEIGHT
from lorakit.reinforcement.rollout_batch import (
    RolloutBatch,
    ScoredCompletion,
    training_examples,
)
from lorakit.reinforcement.rollouts import Completion
from lorakit.types import Origin


def recipe(**values):
    usual = {"model": "demo", "data": "d", "objective": "grpo", "reward_funcs": ["exact_answer"]}
    step = {"num_generations": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    return Recipe.model_validate({**usual, **step, **values})


def scored(reward, tokens, truncated=False, **more):
    completion = Completion(list(range(tokens)), [-0.5] * tokens, 1.0, truncated)
    return ScoredCompletion([7, 8], Origin("d", 1), completion, "text", reward, [reward], **more)


def batch(*completions, **values):
    return RolloutBatch.of(0, list(completions), recipe(**values))


def test_completions_without_influence_are_left_out_and_counted():
    made = batch(scored(1.0, 2), scored(0.0, 3), scored(0.5, 4), scored(0.5, 1))
    examples = training_examples(made, recipe(loss_type="dapo"))
    assert [e.trained_tokens for e in examples] == [2, 3]
    assert [e.token_values[WEIGHT][0] for e in examples] == [1 / 10] * 2
    assert [e.token_values[COMPLETION][0] for e in examples] == [0.0, 1.0]
    assert examples[0].token_values[ADVANTAGE][0] == -examples[1].token_values[ADVANTAGE][0] > 0
    assert examples[0].token_values[SAMPLER] == [-0.5, -0.5]
    assert examples[0].input_ids == [7, 8, 0, 1]
    assert examples[0].labels == [-100, -100, 0, 1]


def test_a_kl_term_needs_all_of_them():
    given = {"old_log_p": [-1.0], "reference_log_p": [-2.0]}
    made = batch(*(scored(0.5, 1, **given) for _ in range(4)))
    examples = training_examples(made, recipe(beta=0.1))
    assert len(examples) == 4
    assert examples[0].token_values[OLD] == [-1.0]
    assert examples[0].token_values[REFERENCE] == [-2.0]


def test_cut_completions_are_left_out_of_the_loss_alone():
    made = batch(scored(1.0, 2), scored(0.0, 3, truncated=True), scored(1.0, 4), scored(0.0, 1))
    examples = training_examples(made, recipe(mask_truncated_completions=True))
    assert [e.trained_tokens for e in examples] == [2, 4, 1]
    assert examples[0].token_values[WEIGHT][0] == 1 / 7


def test_each_rank_gets_an_example():
    made = batch(*(scored(0.5, n) for n in (4, 3, 2, 1)))
    examples = training_examples(made, recipe(), at_least=2)
    assert [e.trained_tokens for e in examples] == [1, 2]
    assert all(e.token_values[WEIGHT][0] == 0 for e in examples)


def test_a_record_survives_a_checkpoint():
    made = scored(0.1, 2, True, old_log_p=[-1 / 3, -0.1])
    again = ScoredCompletion.from_dict(json.loads(json.dumps(made.as_dict())))
    assert again == made


def test_tokens_of_a_batch():
    assert batch(scored(1.0, 2), scored(0.0, 3)).tokens == 9
    assert batch(scored(1.0, 2), scored(0.0, 3)).advantages == pytest.approx([0.707, -0.707], 1e-3)
