"""GRPO's loss and gradient: against TRL's own function and against a plain reference."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from lorakit.reinforcement.policy_loss import (
    ADVANTAGE,
    COMPLETION,
    OLD,
    REFERENCE,
    SAMPLER,
    SUMS,
    WEIGHT,
    PolicyObjective,
    PolicySettings,
    policy_loss,
    sampler_correction,
    token_weights,
)

LENGTHS, VOCABULARY, LONGEST = (5, 2, 7, 4), 11, 9
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


@pytest.fixture(scope="module")
def batch():
    """Logits [4, 7, 11], ids, and log p of sampler, old policy and reference [4, 7]."""
    torch.manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    logits = torch.randn(*shape, VOCABULARY)
    ids = torch.randint(VOCABULARY, shape)
    log_p = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    near = [log_p + 0.3 * torch.randn(shape) for _ in range(3)]
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    return SimpleNamespace(
        logits=logits, ids=ids, sampler=near[0], old=near[1], reference=near[2], adv=advantages
    )


def token_log_p(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def ours(batch, settings, with_old, rows=None):
    """Loss and gradient of lorakit; `rows` are the micro-batches."""
    logits = batch.logits.clone().requires_grad_()
    weights = token_weights(settings.loss_type, LENGTHS, [True] * 4, LONGEST)
    total, sums = 0.0, torch.zeros(len(SUMS))
    for chosen in rows or [[0, 1, 2, 3]]:
        mask = MASK[chosen]
        owner = torch.tensor(chosen).unsqueeze(1).expand_as(mask)[mask]
        values = {
            ADVANTAGE: batch.adv[owner],
            WEIGHT: torch.tensor(weights)[owner],
            COMPLETION: owner.float(),
            SAMPLER: batch.sampler[chosen][mask],
            REFERENCE: batch.reference[chosen][mask],
        }
        if with_old:
            values[OLD] = batch.old[chosen][mask]
        losses = -token_log_p(logits[chosen], batch.ids[chosen])[mask]
        loss, found = PolicyObjective(settings)(losses, values)
        loss.backward()
        total, sums = total + loss.item(), sums + found
    return total, logits.grad, sums


def of_trl(batch, settings, with_old):
    """Loss and gradient of TRL's trainer on the same batch."""
    logits = batch.logits.clone().requires_grad_()
    old = batch.old if with_old else token_log_p(batch.logits, batch.ids)
    difference = (old - batch.sampler) * MASK
    if settings.correction.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if settings.correction.endswith("truncate"):
        ratio = ratio.clamp(max=settings.correction_max)
    else:
        ratio = ratio.masked_fill(ratio > settings.correction_max, 0.0)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            token_log_p(logits, batch.ids), torch.zeros_like(old), None,
        ),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=settings.beta, loss_type=settings.loss_type,
        epsilon_low=settings.epsilon, epsilon_high=settings.epsilon_high, use_vllm=True,
        vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, **_: value,
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=settings.bias_correction_kl, delta=None, steps_per_generation=1
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": batch.ids,
        "completion_mask": MASK.long(),
        "advantages": batch.adv,
        "old_per_token_logps": batch.old if with_old else None,
        "ref_per_token_logps": batch.reference,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": MASK.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logits.grad


def plain(batch, settings):
    """Loss and gradient of the old policy's step, written out token by token."""
    logits = batch.logits.double().requires_grad_()
    completions = []
    for i, length in enumerate(LENGTHS):
        total, product = 0.0, 1.0
        for t in range(length):
            product *= float(torch.exp(batch.old[i, t].double() - batch.sampler[i, t].double()))
        for t in range(length):
            p = torch.softmax(logits[i, t], 0)[batch.ids[i, t]]
            ratio = p / torch.exp(batch.old[i, t].double())
            bounded = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon_high)
            advantage = batch.adv[i].double()
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            correction = product if product <= settings.correction_max else 0.0
            behind = torch.exp(batch.reference[i, t].double()) / p
            kl = behind - torch.log(behind) - 1
            kl = kl * ratio if settings.bias_correction_kl else kl
            total = total - gain * correction + settings.beta * kl
        completions.append(total)
    if settings.loss_type == "grpo":
        each = [total / length for total, length in zip(completions, LENGTHS, strict=True)]
        loss = sum(each) / len(each)
    elif settings.loss_type == "dr_grpo":
        loss = sum(completions) / (len(completions) * LONGEST)
    else:
        loss = sum(completions) / sum(LENGTHS)
    loss.backward()
    return loss.item(), logits.grad.float()


CASES = [
    PolicySettings(loss_type, 0.2, high, beta, bias, mode, 1.5, completions=4)
    for loss_type, high, beta, bias, mode in [
        ("dapo", 0.28, 0.0, True, "sequence_mask"),
        ("dapo", 0.2, 0.1, True, "token_truncate"),
        ("grpo", 0.2, 0.1, False, "sequence_truncate"),
        ("dr_grpo", 0.2, 0.0, True, "token_mask"),
        ("bnpo", 0.2, 0.04, True, "sequence_mask"),
    ]
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.loss_type}-{s.correction}")
@pytest.mark.parametrize("with_old", [False, True], ids=["on policy", "old policy"])
def test_loss_and_gradient_are_those_of_trl(batch, settings, with_old):
    loss, grad, _ = ours(batch, settings, with_old)
    expected, expected_grad = of_trl(batch, settings, with_old)
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", CASES[::2] + CASES[4:], ids=lambda s: s.loss_type)
def test_loss_and_gradient_are_those_of_the_definition(batch, settings):
    if settings.correction != "sequence_mask":
        settings = PolicySettings(
            settings.loss_type, beta=settings.beta, bias_correction_kl=settings.bias_correction_kl,
            correction_max=1.5, completions=4,
        )  # fmt: skip
    loss, grad, _ = ours(batch, settings, with_old=True)
    expected, expected_grad = plain(batch, settings)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", CASES[:3], ids=lambda s: s.loss_type)
def test_micro_batches_add_up_to_the_step(batch, settings):
    loss, grad, sums = ours(batch, settings, True)
    parts, parts_grad, parts_sums = ours(batch, settings, True, [[2], [0, 3], [1]])
    assert parts == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(parts_grad, grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts_sums, sums, rtol=1e-5, atol=1e-5)


def test_padding_of_fixed_shapes_changes_nothing(batch):
    settings = CASES[1]
    values = {name: torch.rand(6) for name in (ADVANTAGE, SAMPLER, REFERENCE, OLD)} | {
        COMPLETION: torch.tensor([0.0, 0, 1, 1, 1, 2]),
        WEIGHT: torch.full((6,), 0.1),
    }
    log_p = -torch.rand(6)
    loss, sums = policy_loss(log_p, values, settings)
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in values.items()}
    again, sums_again = policy_loss(torch.nn.functional.pad(log_p, (0, 3)), padded, settings)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(sums, sums_again)


def test_sums_are_those_of_the_tokens(batch):
    _, _, sums = ours(batch, CASES[1], True)
    found = dict(zip(SUMS, sums.tolist(), strict=True))
    assert found["tokens"] == sum(LENGTHS)
    difference = (batch.old - batch.sampler).abs()[MASK].sum().item()
    assert found["sampler_difference"] == pytest.approx(difference, rel=1e-5)
    assert found["clipped_low"] > 0
    assert found["clipped_high"] > 0
    assert found["kl"] > 0


def test_a_sampler_that_agrees_needs_no_correction():
    for mode in ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"):
        settings = PolicySettings(correction=mode, completions=3)
        factor = sampler_correction(torch.zeros(5), torch.tensor([0.0, 0, 1, 2, 2]), settings)
        assert torch.equal(factor, torch.ones(5))


def test_weights_of_masked_completions():
    lengths, counted = [4, 6], [True, False]
    assert token_weights("dapo", lengths, counted, 10) == [1 / 4, 1 / 4]
    assert token_weights("grpo", lengths, counted, 10) == [1 / 8, 1 / 12]
    assert token_weights("dr_grpo", lengths, counted, 10) == [1 / 20, 1 / 20]
