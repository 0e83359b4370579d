"""Runs with `objective: grpo` on a tiny model: learning, exact resume, faults, files of a run."""

import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lorakit.data.prepare import prepare_data
from lorakit.errors import WorkError
from lorakit.model.load import load_run
from lorakit.pipeline import fit
from lorakit.reinforcement import grpo_trainer
from lorakit.reinforcement.grpo_trainer import GrpoTrainer
from lorakit.reinforcement.held_out import evaluate_held_out
from lorakit.report.page import write_report
from lorakit.storage.run_dir import RunDir, read_lines, read_metrics

QUIET = Console(stderr=True, quiet=True)
SOURCE = '''
def low(completion_ids, **columns):
    """Share of tokens from the first fifth of the vocabulary."""
    return [sum(i < 400 for i in ids) / len(ids) for ids in completion_ids]

def flaky(completions, **columns):
    raise RuntimeError("service is away")

def equal(completions, **columns):
    return [0.5] * len(completions)
'''


@pytest.fixture(scope="module")
def decided_model(tiny_model_dir, tokenizer, tmp_path_factory):
    """The tiny model with a head of its own, whose logits can make one token certain."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    torch.manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    folder = tmp_path_factory.mktemp("decided")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grpo(decided_model, tiny_data, tiny_recipe, tmp_path_factory):
    """`grpo(name, **values)`: the recipe of a tiny run, in a folder of its own."""
    place = tmp_path_factory.mktemp("grpo")
    (place / "mine.py").write_text(SOURCE)

    def build(name, function="low", **values):
        usual = {
            "objective": "grpo",
            "reward_funcs": [{"file": str(place / "mine.py"), "function": function}],
            "max_completion_length": 4,
            "num_generations": 8,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 3,
            "val_size": 0,
        }
        return tiny_recipe(decided_model, tiny_data, place / name, **{**usual, **values})

    return build


@pytest.fixture(scope="module")
def learned(grpo):
    """A run of 12 steps, long enough to learn."""
    return fit(grpo("learned", max_steps=12, save_every=4, keep_checkpoints=5), QUIET)


def adapter_of(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_tiny_model_doubles_its_reward(learned):
    rewards = [row["reward"] for row in read_metrics(learned.run)]
    first, last = sum(rewards[:2]) / 2, sum(rewards[-4:]) / 4
    assert first < 0.35
    assert last > 2 * first


def test_a_row_of_metrics_has_rewards_and_their_parts(learned):
    row = read_metrics(learned.run)[0]
    assert row["rewards/low"] == row["reward"]
    assert row["completions/mean_length"] <= 4
    assert 0 <= row["frac_reward_zero_std"] <= 1
    assert math.log(2048) > row["entropy"] > 5
    assert row["sampling/logp_difference"] < 1e-4
    assert row["seconds/rollout"] > 0
    assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())


def test_rollouts_are_kept_as_text(learned):
    rows = read_lines(learned.run.rollouts)
    assert {row["step"] for row in rows} == set(range(1, 13))
    assert rows[0]["prompt"].startswith("What color is box")
    assert set(rows[0]["rewards"]) == {"low"}
    best, worst = rows[:2]
    assert best["reward"] >= worst["reward"]
    assert best["advantage"] >= worst["advantage"]


def test_a_resumed_run_ends_with_the_same_bytes(learned, grpo):
    resolved = grpo("paused", max_steps=12, save_every=4)
    fit(resolved, QUIET, until=5)
    result = fit(resolved, QUIET, resume=True)
    assert adapter_of(result.run) == adapter_of(learned.run)
    steady = ("reward", "loss", "entropy", "grad_norm")
    mine, theirs = read_metrics(result.run), read_metrics(learned.run)
    assert [[r[k] for k in steady] for r in mine] == [[r[k] for k in steady] for r in theirs]
    assert read_lines(result.run.rollouts) == read_lines(learned.run.rollouts)


@pytest.mark.parametrize("moment", ["_scored", "_with_log_probs"])
def test_a_run_killed_between_rollout_and_update_repeats_the_rollout(grpo, monkeypatch, moment):
    straight = fit(grpo(f"straight {moment}", save_every=1), QUIET)
    resolved = grpo(f"killed {moment}", save_every=1)
    real, calls = getattr(GrpoTrainer, moment), []

    def killed(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(GrpoTrainer, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        fit(resolved, QUIET)
    monkeypatch.undo()
    result = fit(resolved, QUIET, resume=True)
    assert adapter_of(result.run) == adapter_of(straight.run)


def test_a_rollout_of_several_iterations_is_in_the_checkpoint(grpo):
    values = {"num_iterations": 2, "max_steps": 6, "beta": 0.1, "temperature": 0.8}
    straight = fit(grpo("iterations", **values), QUIET)
    resolved = grpo("iterations paused", **values)
    fit(resolved, QUIET, until=3)
    state = json.loads((RunDir(straight.run.path.parent / "iterations paused").checkpoint(3)
                        / "trainer_state.json").read_text())  # fmt: skip
    kept = state["stateful_callbacks"]["RolloutMemory"]["attributes"]["batch"]
    assert kept["number"] == 1
    result = fit(resolved, QUIET, resume=True)
    assert adapter_of(result.run) == adapter_of(straight.run)
    rows = read_metrics(result.run)
    assert all(row["kl"] >= 0 for row in rows)
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"]  # the reference is the base: no change, then some


def test_rewards_that_are_all_equal_change_nothing(grpo):
    with pytest.raises(WorkError, match="training changed nothing"):
        fit(grpo("equal", "equal"), QUIET)


def test_a_failing_function_keeps_the_last_step(grpo, monkeypatch):
    real, calls = grpo_trainer.RewardSet.score, []

    def later(self, attempts):
        calls.append(None)
        if len(calls) == 3:
            raise WorkError("reward flaky: raised RuntimeError: service is away")
        return real(self, attempts)

    monkeypatch.setattr(grpo_trainer.RewardSet, "score", later)
    resolved = grpo("flaky later")
    with pytest.raises(WorkError, match=r"step 3: reward flaky: .*step_000002 is the last"):
        fit(resolved, QUIET)
    monkeypatch.undo()
    result = fit(resolved, QUIET, resume=True)
    assert adapter_of(result.run) == adapter_of(fit(grpo("never flaky"), QUIET).run)


def test_a_function_that_raises_names_itself_and_the_step(grpo):
    with pytest.raises(WorkError, match=r"step 1: reward flaky: raised RuntimeError: service is"):
        fit(grpo("flaky", "flaky"), QUIET)


def test_a_sampler_that_disagrees_is_refused(grpo, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "MOST_DIFFERENCE", 1e-12)
    with pytest.raises(WorkError, match=r"sampler and trainer disagree: mean \|log ratio\|"):
        fit(grpo("disagree"), QUIET)


def test_memory_that_runs_out_in_the_update_is_retried(grpo, monkeypatch):
    straight = fit(grpo("straight"), QUIET)
    real, failed = GrpoTrainer._forward_backward, []

    def once(self, micro, scale):
        if not failed and micro["input_ids"].shape[0] > 2:
            failed.append(None)
            raise torch.OutOfMemoryError("out of memory")
        return real(self, micro, scale)

    monkeypatch.setattr(GrpoTrainer, "_forward_backward", once)
    result = fit(grpo("oom"), QUIET)
    assert failed
    mine, theirs = (read_metrics(r.run)[-1]["reward"] for r in (result, straight))
    assert mine == pytest.approx(theirs, abs=0.2)


def test_held_out_prompts_are_scored_for_base_and_tuned(grpo):
    result = fit(grpo("held out", val_size=4), QUIET)
    scores = json.loads(result.run.eval.read_text())
    assert scores["metrics"]["reward"]["rows"] == 4
    assert set(scores["metrics"]["reward"]) == {"base", "tuned", "rows"}
    assert scores["samples"][0]["prompt"].startswith("What color")
    page = write_report(result.run).read_text()
    assert "reward of held-out prompts" in page
    assert "of step 3" in page  # its completions
    again = evaluate_held_out(load_run(result.run), None, 1)
    assert again.metrics == scores["metrics"]
    assert len(again.samples) == 1


def test_prompts_that_are_too_long_are_left_out_and_counted(grpo, tokenizer, tiny_data, tmp_path):
    long = {"question": "why " * 200, "answer": "so"}
    path = tmp_path / "rows.jsonl"
    path.write_text(tiny_data.read_text() + json.dumps(long) + "\n" + '{"question": "Q"}\n')
    recipe = grpo("long", reward_funcs=["exact_answer"]).recipe.model_copy(
        update={"data": str(path)}
    )
    prepared = prepare_data(recipe, tokenizer)
    faults = {fault.kind: fault.first_rows for fault in prepared.report.faults}
    assert faults["prompt too long"] == ("rows.jsonl:31",)
    assert faults["no answer"] == ("rows.jsonl:32",)
    assert len(prepared.train) == 30
    assert not prepared.train.trained.any()
    assert prepared.report.longest_example == prepared.train.lengths.max() + 4
