"""A preference run: reference, layouts, resume and what it leaves in its folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.preferences import QUIET, labeled, pairs, values_for, write_rows

from lorakit.data.batching import Layout, collate, step_batches
from lorakit.data.prepare import prepare_data
from lorakit.errors import RecipeError, RunError
from lorakit.inference.evaluate import evaluate_loaded
from lorakit.model.load import load_run, load_tokenizer
from lorakit.pipeline import fit
from lorakit.storage.run_dir import RunDir, read_json, read_metrics
from lorakit.train.trainer import LoraTrainer


@pytest.fixture(scope="module")
def run_of(tiny_recipe, tiny_model_dir, tmp_path_factory):
    """`run_of(name, **values)`: a run on twelve pairs with three held out, made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    data = write_rows(folder / "pairs.jsonl", pairs(12))

    def build(name, until=None, **values):
        given = {**values_for("dpo", rows=2), "gradient_accumulation_steps": 2, "val_size": 3,
                 "max_steps": 4, "packing": False, **values}  # fmt: skip
        resolved = tiny_recipe(tiny_model_dir, data, folder / name, **given)
        if name not in made:
            made[name] = resolved, fit(resolved, QUIET, until=until).run
        return made[name]

    return build


def losses_of(run):
    return [row["loss"] for row in read_metrics(run)]


def weights_of(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def test_a_run_leaves_rewards_reference_and_evaluation(run_of):
    _, run = run_of("whole")
    rows = read_metrics(run)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected"} <= rows[0].keys()  # fmt: skip
    assert abs(rows[0]["rewards/margins"]) < 1e-5
    assert rows[-1]["rewards/margins"] > 0.1
    assert rows[-1]["loss"] < rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    kept = load_file(run.reference)
    assert kept["train"].shape == (9, 2)
    assert kept["val"].shape == (3, 2)
    evaluation = read_json(run.eval)
    assert evaluation["preferences"]["rewards/accuracies"] >= 0.5
    assert evaluation["preferences"]["loss"] < np.log(2)
    chosen = [json.loads(line) for line in run.validation.read_text().splitlines()]
    assert all("rejected" in row for row in chosen)
    assert "preferred" in run.report.read_text()


def test_reference_values_are_those_of_pefts_disabled_adapter(run_of):
    resolved, run = run_of("whole")
    loaded = load_run(run, prefer_cpu=True)
    tokenizer = load_tokenizer(resolved.recipe, resolved.recipe.model)
    train = prepare_data(resolved.recipe, tokenizer).train
    expected = []
    with torch.no_grad(), loaded.model.disable_adapter():
        for sequence in (s for e in train for s in e.sequences):
            ids = torch.tensor([sequence.input_ids])
            logps = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            labels = torch.tensor(sequence.labels[1:])
            trained = labels >= 0
            expected.append(logps[trained].gather(1, labels[trained].unsqueeze(1)).sum().item())
    found = load_file(run.reference)["train"].ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_evaluating_the_finished_run_gives_its_own_scores(run_of):
    _, run = run_of("whole")
    loaded = load_run(run, prefer_cpu=True)
    again, before = evaluate_loaded(loaded, None, 1), read_json(run.eval)
    assert again.preferences == pytest.approx(before["preferences"], rel=1e-5)
    assert again.tuned.loss == pytest.approx(before["tuned"]["loss"], rel=1e-6)
    run.reference.rename(run.path / "aside")
    computed = evaluate_loaded(loaded, None, 1)
    (run.path / "aside").rename(run.reference)
    assert computed.preferences == pytest.approx(before["preferences"], rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [{"packing": True, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
     {"micro_batch_size": 1, "gradient_accumulation_steps": 4}, {"fused_layers": "on"}],
    ids=["packed", "one pair at a time", "fused"],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_steps_do_not_depend_on_the_layout(run_of, objective, values):
    _, whole = run_of(f"whole-{objective}", objective=objective)
    name = f"{objective}-{sorted(values)}"
    _, other = run_of(name, objective=objective, **values)
    assert losses_of(other) == pytest.approx(losses_of(whole), rel=1e-5)
    for key, value in weights_of(whole).items():
        np.testing.assert_allclose(weights_of(other)[key], value, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("lost", [False, True], ids=["read", "computed again"])
def test_a_resumed_run_has_the_same_bytes(run_of, tiny_model_dir, tmp_path, lost):
    values = {"optimizer": "adamw", "learning_rate": 1e-2, "lora_dropout": 0.1}
    _, whole = run_of("unbroken", **values)
    resolved, run = run_of(f"broken-{lost}", until=2, **values)
    assert len(losses_of(run)) == 2
    if lost:
        run.reference.write_bytes(b"damaged")
    fit(resolved, QUIET, resume=True)
    assert losses_of(run) == losses_of(whole)
    for key, value in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(run)[key], value)
    assert run.reference.read_bytes() == whole.reference.read_bytes()


def test_a_start_adapter_is_the_reference_and_is_loaded_again(run_of, tiny_recipe, tmp_path):
    _, first = run_of("whole")
    start = tmp_path / "start"
    shutil.copytree(first.path, start)
    values = {"from_adapter": str(start)}
    _, whole = run_of("second", **values)
    rows = read_metrics(whole)
    assert abs(rows[0]["rewards/margins"]) < 1e-5
    kept = load_file(whole.reference)["train"]
    assert np.abs(kept - load_file(first.reference)["train"]).max() > 0.01
    resolved, run = run_of("second-broken", until=2, **values)
    run.reference.unlink()
    aside = start.rename(tmp_path / "gone")
    with pytest.raises(RunError, match="is gone, and reference"):
        fit(resolved, QUIET, resume=True)
    aside.rename(start)
    fit(resolved, QUIET, resume=True)
    assert losses_of(run) == losses_of(whole)


def test_kto_runs_with_labels_and_with_pairs(run_of, tiny_recipe, tiny_model_dir, tmp_path):
    _, run = run_of("kto", objective="kto")
    rows = read_metrics(run)
    assert {"kl", "rewards/margins"} <= rows[0].keys()
    assert "rewards/accuracies" not in rows[0]
    assert rows[-1]["rewards/margins"] > 0
    assert load_file(run.reference)["train"].shape[1] == 2
    data = write_rows(tmp_path / "labels.jsonl", labeled(8))
    resolved = tiny_recipe(
        tiny_model_dir, data, tmp_path / "run", **values_for("kto", rows=4, steps=2)
    )
    assert fit(resolved, QUIET).steps == 2


def test_a_pair_stays_in_one_micro_batch(run_of):
    resolved, _ = run_of("whole")
    tokenizer = load_tokenizer(resolved.recipe, resolved.recipe.model)
    examples = list(prepare_data(resolved.recipe, tokenizer).train)
    for layout in (Layout(0, 2, 10**6, False), Layout(0, 2, 200, True)):
        step = step_batches(examples, layout)
        assert len(step.micro) > 1
        assert sum(len(m["counts"]) for m in step.micro) == 2 * len(examples)
        for micro in step.micro:
            assert len(micro["counts"]) % 2 == 0
            assert len(micro["sequence"]) == len(micro["targets"]) == micro["counts"].sum()
    alone = collate(examples[0].sequences, 0)
    assert alone["input_ids"].shape[0] == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"objective": "sft", "beta": 0.1}, "beta has no effect with objective: sft"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no effect with objective: dpo"),
        ({"train_on": "all"}, "train_on: all has no effect with objective: dpo"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef is not supported"),
    ],
)
def test_keys_that_have_no_effect_are_refused(tiny_recipe, tmp_path, values, said):
    with pytest.raises(RecipeError, match=said):
        tiny_recipe("m", "d", tmp_path, **{"objective": "dpo", **values})


def test_defaults_follow_the_objective(tiny_recipe, tmp_path):
    from lorakit.recipe.schema import Recipe

    values = {"model": "m", "data": "d"}
    assert Recipe(**values).learning_rate == 1e-4
    recipe = Recipe(**values, objective="simpo")
    assert (recipe.learning_rate, recipe.lora_dropout, recipe.beta_value) == (1e-5, 0.0, 2.0)
    assert Recipe(**values, objective="dpo").beta_value == 0.1
    assert Recipe(**values, objective="dpo", method="qlora").lora_r == 64
    assert RunDir(tmp_path).reference.name == "reference.safetensors"


def test_a_step_out_of_memory_is_repeated_with_fewer_pairs_at_once(run_of, monkeypatch):
    values = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "objective": "kto"}
    _, whole = run_of("roomy", **values)
    compute, tried = LoraTrainer._forward_backward, []

    def small(trainer, micro, scale):
        tried.append(len(micro["counts"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(trainer, micro, scale)

    monkeypatch.setattr(LoraTrainer, "_forward_backward", small)
    _, run = run_of("narrow", **values)
    assert tried[0] == 4
    assert set(tried[1:]) == {2}
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-5)
    names = ("rewards/chosen", "rewards/margins", "kl", "logps/rejected")
    for ours, theirs in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], abs=1e-4)


def test_held_out_scores_choose_the_best_step(run_of):
    _, run = run_of("scored", eval_every=2, metric_for_best_model="eval_rewards/accuracies",
                    load_best_model_at_end=True)  # fmt: skip
    held = read_metrics(run, held_out=True)
    assert [row["step"] for row in held] == [2, 4]
    assert {"eval_rewards/margins", "eval_rewards/accuracies", "eval_loss"} <= held[0].keys()
    assert read_json(run.best)["metric"] == "eval_rewards/accuracies"
