"""Each objective has the losses, metrics and weights of TRL's trainer on the same tokens."""

from types import SimpleNamespace

import pytest
import torch
from tests.preferences import (
    adapter_of,
    labeled,
    our_run,
    pairs,
    same_weights,
    their_run,
    values_for,
    write_rows,
)

from lorakit.data.prepare import prepare_data
from lorakit.model.load import load_tokenizer
from lorakit.recipe.schema import Recipe
from lorakit.train.preference_loss import Answers, PreferenceObjective, metrics_of


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("dpo", {}),
        ("ipo", {"beta": 0.5}),
        ("simpo", {"beta": 2.5, "simpo_gamma": 1.0}),
        ("kto", {"desirable_weight": 1.5}),
    ],
)
def test_a_run_is_that_of_trl(objective, more, tiny_recipe, tiny_model_dir, tmp_path):
    rows = labeled() if objective == "kto" else pairs()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    values = values_for(objective, **more)
    resolved = tiny_recipe(tiny_model_dir, data, tmp_path / "run", **values)
    recipe = resolved.recipe
    examples = prepare_data(recipe, load_tokenizer(recipe, recipe.model)).train
    run, ours = our_run(resolved)
    history, weights = their_run(objective, resolved, list(examples), tmp_path / "trl")
    assert len(ours) == len(history) == 4
    names = [n for n in history[0] if n.startswith(("rewards/", "logps/")) or n == "kl"]
    assert "rewards/margins" in names
    for our, their in zip(ours, history, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-5, abs=1e-6)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
        # At step 1 all rewards are 0 up to rounding: which one is larger says nothing.
        for name in names if our["step"] > 1 else set(names) - {"rewards/accuracies"}:
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), name
    assert ours[-1]["loss"] < ours[0]["loss"]
    same_weights(adapter_of(run), weights)


def objective_of(name, **values):
    recipe = Recipe(model="m", data="d", objective=name, **values)
    return PreferenceObjective(recipe, torch.device("cpu"))


def test_orpo_has_trls_odds_ratio_and_the_likelihood_of_the_chosen_tokens():
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    counts = torch.tensor([3.0, 5.0, 2.0, 4.0])
    logps = (-counts * torch.rand(4)).requires_grad_()
    ours = objective_of("orpo", beta=0.3)
    ours.token_weight.fill_(2 / 5)
    loss = ours.losses(Answers(logps, counts, torch.zeros(4))).mean()
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    means = logps / counts
    theirs, *_ = ORPOTrainer.odds_ratio_loss(stub, means[::2], means[1::2])
    expected = -logps[::2].sum() / 5 - theirs.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logps, retain_graph=True) for value in (loss, expected))
    )


def test_orpo_stays_finite_for_answers_that_are_certain_or_impossible():
    logps = torch.tensor([-1e-9, -900.0, -800.0, 0.0]).requires_grad_()
    ours = objective_of("orpo")
    loss = ours.losses(Answers(logps, torch.ones(4), torch.zeros(4))).sum()
    (grad,) = torch.autograd.grad(loss, logps)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_losses_of_tokens_are_summed_by_sequence():
    """Padding of CUDA graphs has loss 0 and belongs to sequence 0."""
    ours = objective_of("dpo", beta=0.5)
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0]).requires_grad_()
    micro = {
        "sequence": torch.tensor([0, 0, 1, 1, 0]),
        "counts": torch.tensor([2.0, 2.0]),
        "reference": torch.tensor([-2.0, -7.0]),
    }
    loss, sums = ours(losses, micro)
    delta = 0.5 * ((-3 + 2) - (-12 + 7))
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-delta)).item())
    found = metrics_of(sums.tolist(), paired=True)
    assert found == {
        "rewards/chosen": -0.5, "logps/chosen": -3.0, "rewards/rejected": -2.5,
        "logps/rejected": -12.0, "rewards/margins": 2.0, "rewards/accuracies": 1.0,
    }  # fmt: skip
    (grad,) = torch.autograd.grad(loss, losses)
    assert (grad[:2] > 0).all()
    assert (grad[2:4] < 0).all()


def test_labels_of_one_kind_have_no_margin():
    ours = objective_of("kto")
    answers = Answers(torch.tensor([-1.0, -2.0]), torch.ones(2), torch.zeros(2), torch.ones(2))
    found = metrics_of(ours.sums(answers).tolist(), paired=False)
    assert found.keys() == {"rewards/chosen", "logps/chosen"}
    assert ours.losses(answers).tolist() == pytest.approx(
        [1 - torch.sigmoid(torch.tensor(0.1 * value)).item() for value in (-1.0, -2.0)]
    )
