"""A step that is not finite changes nothing and is named; the second ends the run."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from lorakit.errors import WorkError
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import read_metrics
from lorakit.train import stability
from lorakit.train.stability import StepGuard, format_row_origins, params_without_grad
from lorakit.types import Example, Origin

from .faults import examples, nan_where, poison, said, trained, trainer_of

LENGTHS = [9, 30, 14, 22, 40, 7, 11, 26, 18, 5, 33, 16]


class Snapshots(TrainerCallback):
    """Keeps what is trained after each step."""

    def __init__(self, trainer):
        self.trainer, self.after = trainer, [None]

    def on_step_end(self, args, state, control, **_):
        self.after.append(trained(self.trainer))


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    def make(name="r", lengths=LENGTHS, **values):
        values = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, **values}
        return trainer_of(tiny_model_dir, tmp_path / name, examples(lengths), **values)

    return make


@pytest.mark.parametrize("kind", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_one_bad_step_is_skipped_and_leaves_weights_and_optimizer_alone(run, kind):
    trainer = run(max_steps=4)
    shots = Snapshots(trainer)
    trainer.add_callback(shots)
    poison(trainer, [3], kind)
    trainer.train()
    assert shots.after[3] == shots.after[2]
    assert shots.after[4] != shots.after[3]
    rows = read_metrics(trainer.run)
    assert [r.get("skipped") for r in rows] == [None, None, 1, None]
    assert math.isfinite(rows[3]["loss"]), "one bad loss does not stay in the sum"
    assert (rows[2]["loss"] is None) == kind.startswith("loss")
    (line,) = [x for x in said(trainer).splitlines() if "update skipped" in x]
    assert line.startswith(f"step 3: {'loss' if 'loss' in kind else 'gradient norm'} ")
    assert "rows of the step: rows.jsonl: " in line
    assert line.split("rows.jsonl: ")[1].split(";")[0].count(",") == 3


@pytest.mark.parametrize("kind", ["loss nan", "gradient nan"])
def test_the_mean_of_a_row_is_of_the_losses_that_are_numbers(run, kind):
    plain = run("plain", max_steps=2)
    plain.train()
    first, second = [r["loss"] for r in read_metrics(plain.run)]
    trainer = run("r", max_steps=2, log_every=2)
    poison(trainer, [2], kind)
    trainer.train()
    (row,) = read_metrics(trainer.run)
    mean = first if kind == "loss nan" else (first + second) / 2
    assert (row["loss"], row["skipped"]) == (pytest.approx(mean, rel=1e-6), 1)


def test_the_second_one_ends_the_run_with_both_named_and_the_checkpoint_kept(run):
    trainer = run(max_steps=6, save_every=1, keep_checkpoints=1)
    shots = Snapshots(trainer)
    trainer.add_callback(shots)
    poison(trainer, [3, 5], "gradient inf")
    with pytest.raises(WorkError) as error:
        trainer.train()
    head, first, second, kept = error.value.message.splitlines()
    assert "stopped before the update, and no adapter was saved" in head
    assert first.startswith("  step 3: gradient norm inf; rows of the step: rows.jsonl: ")
    assert second.startswith("  step 5: gradient norm inf; rows of the step: rows.jsonl: ")
    assert kept == "  step_000004 is the last checkpoint"
    assert "the gradient overflows" in error.value.hint
    assert error.value.exit_code == 1
    assert trained(trainer) == shots.after[4]


def test_rows_that_are_bad_by_themselves_are_named_alone(run):
    """One token, whose embedding is NaN, stands in one row: it comes once an epoch of 3 steps."""
    trainer = run(max_steps=12)
    rows = trainer.train_rows
    token = next(t for t in rows[4].input_ids if sum(t in e.input_ids for e in rows) == 1)
    nan_where(trainer.model, [token])
    with pytest.raises(WorkError) as error:
        trainer.train()
    assert error.value.message.count("not finite by themselves: rows.jsonl: 5\n") == 2
    assert "fix or remove these rows" in error.value.hint


def test_bad_steps_far_apart_do_not_end_a_run(run, monkeypatch):
    monkeypatch.setattr(stability, "WINDOW", 2)
    trainer = run(max_steps=6)
    poison(trainer, [1, 4], "loss inf")
    trainer.train()
    assert said(trainer).count("update skipped") == 2
    assert trainer.state.global_step == 6


def test_a_resumed_run_knows_the_bad_step_before_it(run):
    values = {"max_steps": 6, "save_every": 4}
    trainer = run("r", **values)
    poison(trainer, [3], "loss nan")
    trainer.train()
    resumed = run("r", **values)
    poison(resumed, [5], "loss nan")
    with pytest.raises(WorkError, match=r"(?s)step 3: loss nan.*step 5: loss nan"):
        resumed.train(resume_from_checkpoint=str(resumed.run.checkpoint(4)))


def test_a_gradient_far_above_the_usual_is_named_and_trained(run, monkeypatch):
    monkeypatch.setattr(stability, "MIN_HISTORY", 3)
    trainer = run(max_steps=6)
    poison(trainer, [5], "gradient spike")
    trainer.train()
    (line,) = [x for x in said(trainer).splitlines() if "usually" in x]
    assert line.startswith("step 5: gradient norm ")
    assert "clipped to 1; rows of the step: rows.jsonl: " in line
    assert [r.get("spike") for r in read_metrics(trainer.run)] == [None] * 4 + [True, None]


def watcher(**values):
    """A guard without a run, and what it says."""
    lines = []
    recipe = Recipe(model="m", data="d", **values)
    return StepGuard(recipe, lines.append, lambda examples: [], lambda: ""), lines


def feed(own, losses, norms, scaled=False, first=1):
    """Steps through a guard, with a model whose one weight has a gradient."""
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        model = torch.nn.Linear(1, 1)
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        own.check(model, step, torch.tensor(loss), norm, examples([4]), scaled)


@pytest.mark.parametrize(
    ("apart", "ends"), [(stability.WINDOW, True), (stability.WINDOW + 1, False)]
)
def test_the_second_bad_step_ends_a_run_up_to_the_last_step_of_the_window(apart, ends):
    own, lines = watcher()
    feed(own, [math.nan], [1.0])
    with pytest.raises(WorkError) if ends else nullcontext():
        feed(own, [math.nan], [1.0], first=1 + apart)
    assert len([x for x in lines if "update skipped" in x]) == (1 if ends else 2)


def test_a_checkpoint_keeps_the_bad_step():
    before, _ = watcher()
    feed(before, [math.nan], [1.0])
    state = SimpleNamespace(stateful_callbacks={"StepGuard": before.state()})
    after, _ = watcher()
    after.on_train_begin(None, state, None)
    assert after.bad == before.bad
    assert after.bad["step"] == 1


def test_a_loss_far_above_the_usual_is_named_three_times_at_most():
    own, lines = watcher()
    feed(own, [1.0] * 25 + [3.1] * 5, [0.5] * 30)
    assert len([x for x in lines if "loss 3.1, usually 1; rows of the step" in x]) == 3
    assert lines[-1] == "further spikes are marked in metrics.jsonl only"
    assert own.row(1.0)["spike"]
    assert "spike" not in own.row(1.0)


def test_usual_noise_is_no_spike():
    own, lines = watcher()
    draw = torch.Generator().manual_seed(0)
    losses = (1.2 + 0.3 * torch.randn(500, generator=draw)).tolist()
    norms = (0.5 * torch.randn(500, generator=draw)).exp().tolist()
    feed(own, losses, norms)
    assert lines == []


def test_a_loss_scaler_skips_on_its_own_and_only_many_are_told():
    own, lines = watcher()
    feed(own, [2.0] * 4, [math.inf, 0.4, math.nan, 0.4], scaled=True)
    assert lines == []
    feed(own, [2.0] * 10, [math.inf] * 10, scaled=True)
    (line,) = lines
    assert "11 of the last 20 steps overflowed in float16 and changed nothing" in line
    # A loss that is no number is no matter of the scale.
    with pytest.raises(WorkError):
        feed(own, [math.nan] * 2, [math.nan] * 2, scaled=True)


def test_no_gradient_at_all_stops_the_first_step(run):
    trainer = run(max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(WorkError, match="step 1: no gradient reaches the adapters") as error:
        trainer.train()
    assert "nothing would be learned" in error.value.message
    assert "target_modules" in error.value.hint


def test_adapters_without_a_gradient_are_told(run):
    trainer = run(max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        if "layers.1.self_attn" in name and "lora_B" in name:
            parameter.register_hook(torch.zeros_like)
    trainer.train()
    assert said(trainer).count("step 1: no gradient reaches 2 of 6 trained tensors") == 1
    assert "layers.1.self_attn.q_proj.lora_B" in said(trainer)


@pytest.mark.parametrize(
    "values",
    [{"target_modules": ["q_proj", "embed_tokens"]}, {"use_dora": True}, {"bias": "lora_only"}],
)
def test_a_factor_without_gradient_by_construction_is_no_alarm(run, values):
    """lora_embedding_B is multiplied by a matrix of zeros in the first step."""
    trainer = run(max_steps=2, **values)
    trainer.train()
    assert "no gradient" not in said(trainer)


def test_an_embedding_without_a_gradient_is_told(run):
    trainer = run(max_steps=2, target_modules=["q_proj", "embed_tokens"])
    for name, parameter in trainer.model.named_parameters():
        if "lora_embedding_A" in name:
            parameter.register_hook(torch.zeros_like)
    trainer.train()
    assert "lora_embedding_A" in said(trainer)


def test_a_model_that_learns_reaches_all():
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    assert params_without_grad(model, 1) is None


def test_rows_are_named_once_by_source():
    made = [Example([1], [1], Origin(s, r)) for s, r in [("a", 3), ("b", 1), ("a", 3), ("a", 9)]]
    assert format_row_origins(made) == "a: 3, 9; b: 1"
    many = [Example([1], [1], Origin("a", r)) for r in range(70)]
    assert format_row_origins(many).endswith(", 63 and 6 more")
