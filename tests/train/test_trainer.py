"""The trainer gets exactly our rows, keeps adapters float32, and lets none of TRL's defaults in."""

import itertools
import time

import pytest
import torch
from rich.console import Console

from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_tokenizer
from lorakit.model.lora_config import add_adapter
from lorakit.planning.memory import plan_memory
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, read_metrics
from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest
from lorakit.train.trainer import LoraTrainer, pad_token_id
from lorakit.types import IGNORE, Example, Origin

CPU = detect_device("float32", prefer="cpu")


def recipe(model="m", **values):
    return Recipe(model=str(model), data="d", target_modules=["q_proj", "v_proj"], **values)


def examples(lengths):
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 900, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        rows.append(Example(ids, [IGNORE, IGNORE, *ids[2:]], Origin("x", i)))
    return rows


def trainer_of(folder, tmp_path, rows, device=CPU, **values):
    r = recipe(folder, **values)
    torch.manual_seed(0)
    model = add_adapter(load_base(r, str(folder), device), r)
    run = RunDir(tmp_path)
    progress = TrainingProgress(Console(quiet=True), run, "cpu")
    tokenizer = load_tokenizer(r, str(folder))
    plan = plan_memory(r, model.get_base_model().config, device)
    return LoraTrainer(model, tokenizer, r, device, plan, run, rows, [], progress, StopRequest())


@pytest.mark.parametrize("packing", [True, False])
def test_rows_reach_the_model_whole_and_untouched(tiny_model_dir, tmp_path, packing):
    rows = examples([300, 7, 12, 9])
    trainer = trainer_of(
        tiny_model_dir, tmp_path, rows, max_steps=1, micro_batch_size=4, packing=packing
    )
    assert trainer.layout.packed == packing == trainer.packing.startswith("on: ")
    step = next(iter(trainer.get_train_dataloader()))["ready"]().own
    seen = set()
    for micro in step.micro:
        if "lengths" in micro:
            documents = micro["input_ids"][0].split(micro["lengths"])
        else:
            mask = micro.get("attention_mask", torch.ones_like(micro["input_ids"]))
            documents = [i[m.bool()] for i, m in zip(micro["input_ids"], mask, strict=True)]
        seen |= {tuple(d.tolist()) for d in documents}
    assert seen == {tuple(r.input_ids) for r in rows}
    assert step.supervised == sum(r.trained_tokens for r in rows)
    assert sum(len(m["targets"]) for m in step.micro) == step.supervised
    assert step.tokens == 328


def test_nobody_is_told_of_a_run(tiny_model_dir, tmp_path, monkeypatch):
    from trl.trainer import base_trainer

    told = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **k: told.append((a, k)))
    trainer_of(tiny_model_dir, tmp_path, examples([9, 7]), max_steps=1)
    assert not told


def test_the_next_step_is_made_ready_before_this_one_is_taken(tiny_model_dir, tmp_path):
    """The card computes meanwhile; afterwards it would wait for it."""
    rows = examples([9, 7, 12, 9] * 8)
    trainer = trainer_of(tiny_model_dir, tmp_path, rows, max_steps=4)
    plain, taken = trainer._ready, []

    def ready(rows):
        taken.append(trainer.state.global_step)
        return plain(rows)

    trainer._ready = ready
    trainer.train()
    assert taken == [0, 0, 1, 2]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_keep_their_exact_float32_start(tiny_model_dir, tmp_path, method):
    """SFTTrainer rounds the adapters of a quantized base to bf16."""
    device = detect_device("bfloat16", prefer="cpu")
    r = recipe(tiny_model_dir, method=method)
    torch.manual_seed(0)
    before = add_adapter(load_base(r, str(tiny_model_dir), device), r)
    start = {n: p.clone() for n, p in before.named_parameters() if p.requires_grad}
    rows = examples([9, 9, 9, 9])
    trainer = trainer_of(tiny_model_dir, tmp_path, rows, device, method=method)
    now = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in now.values()} == {torch.float32}
    assert set(now) == set(start)
    for name, parameter in now.items():
        assert torch.equal(parameter, start[name]), name


def test_every_adapter_element_moves_at_a_low_rate(tiny_model_dir, tmp_path):
    """In bf16 only 22% of lora_A's elements moved in 12 steps at 2e-5."""
    device = detect_device("bfloat16", prefer="cpu")
    trainer = trainer_of(
        tiny_model_dir,
        tmp_path,
        examples([30] * 12),
        device,
        method="qlora",
        learning_rate=2e-5,
        max_steps=12,
        gradient_accumulation_steps=1,
        lr_scheduler="constant",
    )
    start = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_A" in n}
    trainer.train()
    moved = [
        (p != start[n]).float().mean() for n, p in trainer.model.named_parameters() if n in start
    ]
    assert min(moved) > 0.95


def test_gradient_of_a_step_is_the_same_for_any_split(tiny_model_dir, tmp_path):
    """Eight unequal rows as 8x1, 2x4, 1x8, packed and padded: equal weights after two steps."""
    ends, losses = [], []
    splits = [(8, 1, True), (2, 4, True), (1, 8, True), (8, 1, False), (1, 8, False)]
    for i, (micro, accumulation, packing) in enumerate(splits):
        trainer = trainer_of(
            tiny_model_dir,
            tmp_path / str(i),
            examples([5, 30, 8, 17, 40, 6, 11, 23]),
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            packing=packing,
            max_steps=2,
            lora_dropout=0.0,
            learning_rate=1e-2,
        )
        trainer.train()
        ends.append({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})
        losses.append([row["loss"] for row in read_metrics(trainer.run)])
    # Adam would hide a factor that all micro-batches of a step share: the losses do not.
    assert losses == [pytest.approx(losses[0], rel=1e-4)] * len(splits)
    for other in ends[1:]:
        for name, parameter in other.items():
            torch.testing.assert_close(parameter, ends[0][name], rtol=1e-3, atol=1e-5)


def test_loss_and_gradient_of_a_step_are_means_over_its_supervised_tokens(tiny_model_dir, tmp_path):
    """Against autograd on each row alone: what all layouts share, they cannot show each other."""
    rows = examples([5, 30, 8, 17])
    trainer = trainer_of(
        tiny_model_dir,
        tmp_path,
        rows,
        max_steps=1,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        lora_dropout=0.0,
    )
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        log_p = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        supervised = labels != IGNORE
        total = total - log_p[supervised, labels[supervised]].sum()
        count += int(supervised.sum())
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total / count, trained)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    trainer.train()
    (row,) = read_metrics(trainer.run)
    assert row["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_trainer_scores_every_held_out_row(tiny_model_dir, tmp_path):
    rows = examples([5, 30, 8, 17])
    trainer = trainer_of(tiny_model_dir, tmp_path, rows, max_steps=1)
    found = trainer.score(rows)
    assert found.tokens == sum(row.trained_tokens for row in rows)
    alone = [trainer.score([row]) for row in rows]
    expected = sum(one.loss * one.tokens for one in alone) / found.tokens
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_row_has_the_tokens_of_all_its_steps(tiny_model_dir, tmp_path):
    rows = examples([5, 30, 8, 17])
    trainer = trainer_of(
        tiny_model_dir,
        tmp_path,
        rows,
        max_steps=4,
        log_every=4,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
    )
    trainer.train()
    (row,) = read_metrics(trainer.run)
    assert row["tokens"] == 60


def test_padding_id_may_be_the_end_of_turn():
    tokenizer = type("T", (), {"pad_token_id": None, "eos_token_id": 2})
    assert pad_token_id(tokenizer) == 2


def test_a_clock_that_jumps_leaves_times_alone(tiny_model_dir, tmp_path, monkeypatch):
    """The wall clock goes an hour back at each look; transformers looks, our rows do not."""
    trainer = trainer_of(tiny_model_dir, tmp_path, examples([9] * 8), max_steps=3)
    looks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(looks))
    trainer.train()
    assert next(looks) > 0
    rows = read_metrics(trainer.run)
    assert len(rows) == 3
    assert all(0 < r["seconds"] < 60 and r["tokens_per_second"] > 0 for r in rows)


@pytest.mark.parametrize(("chosen", "recomputes"), [("auto", True), (False, False)])
def test_layers_that_the_plan_was_not_made_for_keep_as_little_as_they_can(
    tiny_model_dir, tmp_path, chosen, recomputes
):
    """The fast layers were planned, and turn out not to serve: ranks differ within q, k, v."""
    trainer = trainer_of(
        tiny_model_dir, tmp_path, examples([9, 7]), max_steps=1, fused_layers="on",
        rank_pattern={"q_proj": 4}, gradient_checkpointing=chosen,
    )  # fmt: skip
    assert trainer.plan.engine
    assert not any(trainer.plan.keep)
    assert trainer.attached.engine is None
    layers = trainer.model.get_base_model().model.layers
    assert all(layer.gradient_checkpointing is recomputes for layer in layers)


def test_lora_plus_gives_lora_b_a_rate_of_its_own(tiny_model_dir, tmp_path):
    values = {"learning_rate": 1e-4, "loraplus_lr_ratio": 16.0, "weight_decay": 0.1}
    trainer = trainer_of(tiny_model_dir, tmp_path, examples([20] * 4), max_steps=2, **values)
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(trainer.trained) == 8
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4), name
    assert {g["weight_decay"] for g in optimizer.param_groups if g["params"]} == {0.1}
    trainer.take_steps(None)
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-4
    assert [row["step"] for row in read_metrics(RunDir(tmp_path))] == [1, 2]
