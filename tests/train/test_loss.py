"""The gathered loss equals the model's own, and does not depend on how a batch is cut."""

import pytest
import torch
from tests.engine.engine_models import examples as random_rows
from tests.engine.engine_models import tiny

from lorakit.data.batching import collate, pack
from lorakit.hardware import detect_device
from lorakit.model.load import load_base
from lorakit.model.lora_config import add_adapter
from lorakit.recipe.schema import Recipe
from lorakit.train.loss import attach_loss, base_of, detach_loss
from lorakit.types import IGNORE, Example, Origin

TARGETS = ["q_proj", "v_proj", "down_proj"]


def model_of(folder, **values):
    recipe = Recipe(model=str(folder), data="d", lora_dropout=0.0, target_modules=TARGETS, **values)
    torch.manual_seed(0)
    model = add_adapter(load_base(recipe, str(folder), detect_device("float32", "cpu")), recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def examples():
    rows = []
    for i, (length, prompt) in enumerate([(12, 4), (5, 2), (9, 8), (20, 3), (7, 1), (3, 2)]):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 1000, (length,), generator=generator).tolist()
        rows.append(Example(ids, [IGNORE] * prompt + ids[prompt:], Origin("x", i)))
    return rows


def inputs_and_targets():
    """What the model's own forward takes, what ours takes besides, and labels in HF's form."""
    rows = examples()
    batch = collate(rows, 0)
    targets = {k: batch.pop(k) for k in ("positions", "targets")}
    width = batch["input_ids"].shape[1]
    labels = torch.tensor([e.labels + [IGNORE] * (width - len(e.labels)) for e in rows])
    return batch, targets, labels


def gradients(model, micro_batches, tokens):
    model.zero_grad()
    total = 0.0
    for rows in micro_batches:
        out = model(**collate(rows, 0), use_cache=False)
        (out.loss_sum / tokens).backward()
        total += out.loss_sum.item() / tokens
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_equal_the_models_own(tiny_model_dir):
    model = model_of(tiny_model_dir)
    batch, _, labels = inputs_and_targets()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    own = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert "supervised tokens only" in attach_loss(model).loss
    total, found = gradients(model, [examples()], 1)
    assert total == pytest.approx(own.item(), rel=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_losses_of_tokens_are_those_of_the_models_own_logits(tiny_model_dir):
    model = model_of(tiny_model_dir)
    batch, targets, labels = inputs_and_targets()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    own = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
    )
    attach_loss(model)
    found = model(**batch, **targets, use_cache=False, per_token=True)
    torch.testing.assert_close(found.token_losses, own[labels[:, 1:].flatten() != IGNORE])
    assert found.loss_sum == found.token_losses.sum()
    assert model(**batch, **targets, use_cache=False).token_losses is None


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [5, 1], [3, 3]])
def test_loss_is_invariant_to_how_the_batch_is_split(tiny_model_dir, sizes):
    model = model_of(tiny_model_dir)
    attach_loss(model)
    rows = examples()
    tokens = sum(e.trained_tokens for e in rows)
    whole = gradients(model, [rows], tokens)
    parts, start = [], 0
    for size in sizes:
        parts.append(rows[start : start + size])
        start += size
    split = gradients(model, parts, tokens)
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    for name, gradient in split[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-4, atol=1e-7)


def test_inference_keeps_the_models_own_forward_and_detach_restores_it(tiny_model_dir):
    model = model_of(tiny_model_dir)
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    attach_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" in base_of(model).__dict__
    detach_loss(model)
    assert "forward" not in base_of(model).__dict__


@pytest.mark.parametrize("family", ["gemma2", "granite", "qwen3", "cohere"])
def test_families_that_scale_their_logits_get_the_same_loss(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {
        "granite": {"logits_scaling": 3.0},
        "gemma2": {"head_dim": 8},
        "qwen3": {"head_dim": 8},
    }
    config = AutoConfig.for_model(
        family,
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        **extra.get(family, {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    batch, targets, labels = inputs_and_targets()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    own = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert "supervised tokens only" in attach_loss(model).loss
    out = model(**batch, **targets, use_cache=False)
    assert out.loss_sum.item() == pytest.approx(own.item(), rel=1e-5)
    assert len(targets["targets"]) == sum(e.trained_tokens for e in examples())


def own_loss(model, batch, labels):
    """Summed over the supervised tokens, from the model's own logits."""
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def gradients_of(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def with_a_biased_head(model):
    head = torch.nn.Linear(64, 300)
    base_of(model).lm_head = head.requires_grad_(False)
    return model


LORA_OF = {
    "gemma2": lambda: tiny(
        "gemma2", base_changes={"final_logit_softcapping": 0.5}, attention="eager"
    ),
    "granite": lambda: tiny("granite", base_changes={"logits_scaling": 3.0}),
    "cohere": lambda: tiny("cohere", base_changes={"pad_token_id": 0}),
    "biased head": lambda: with_a_biased_head(tiny()),
    "head that trains": lambda: tiny(modules_to_save=["lm_head"]),
    "adapted head": lambda: tiny(target_modules=["q_proj", "lm_head"]),
    "plain head": tiny,
}


@pytest.mark.parametrize("case", LORA_OF)
def test_adapters_learn_through_the_head_that_the_model_has(case):
    """With a frozen base: what is more than a plain product must not take the product's path."""
    model = LORA_OF[case]().eval()
    rows = random_rows((12, 5, 9))
    batch = collate(rows, 0)
    targets = {k: batch.pop(k) for k in ("positions", "targets")}
    width = batch["input_ids"].shape[1]
    labels = torch.tensor([e.labels + [IGNORE] * (width - len(e.labels)) for e in rows])
    own = own_loss(model, batch, labels)
    expected = gradients_of(model, own)
    attached = attach_loss(model)
    assert attached.frozen_head is (case == "plain head")
    loss = model(**batch, **targets, use_cache=False).loss_sum
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    torch.testing.assert_close(gradients_of(model, loss), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "engine_runs"), [(4, False), (32, True)])
def test_rows_longer_than_the_window_are_left_to_the_model(window, engine_runs, packed):
    model = tiny("mistral", base_changes={"sliding_window": window})
    rows = random_rows((12, 7))
    alone = []
    for row in rows:
        labels = torch.tensor([row.labels])
        alone.append(own_loss(model, {"input_ids": torch.tensor([row.input_ids])}, labels))
    expected = gradients_of(model, sum(alone))
    attached = attach_loss(model, "on")
    calls = []
    run = type(attached.engine).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(attached.engine), "__call__", lambda *given: calls.append(1) or run(*given)
        )
        batch = pack(rows) if packed else collate(rows, 0)
        loss = model(**batch, use_cache=False).loss_sum
    assert bool(calls) == engine_runs
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    torch.testing.assert_close(gradients_of(model, loss), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_changes_its_logits_in_its_own_way_falls_back_and_is_still_right(
    tiny_model_dir,
):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = Odd(plain.config)
    model.load_state_dict(plain.state_dict())
    batch, targets, labels = inputs_and_targets()
    own = torch.nn.functional.cross_entropy(
        model(**batch).logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    assert "all positions" in attach_loss(model).loss
    assert model(**batch, **targets).loss_sum.item() == pytest.approx(own.item(), rel=1e-6)


@pytest.mark.parametrize("engine", ["on", "off"])
@pytest.mark.parametrize("capacity", [20, 40, 1000])
def test_packed_examples_have_the_loss_and_the_gradients_of_single_ones(
    tiny_model_dir, engine, capacity
):
    from lorakit.data.batching import Layout, step_batches

    model = model_of(tiny_model_dir)
    attached = attach_loss(model, engine)
    assert attached.packs
    assert (attached.engine is not None) == (engine == "on")
    rows = examples()
    tokens = sum(e.trained_tokens for e in rows)
    alone = gradients(model, [[row] for row in rows], tokens)
    step = step_batches(rows, Layout(pad_id=0, rows=2, capacity=capacity, packed=True))
    model.zero_grad()
    total = 0.0
    for micro in step.micro:
        loss = model(**micro, use_cache=False).loss_sum / tokens
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(alone[0], rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = alone[1][name]
            assert float((parameter.grad - expected).norm()) <= 1e-5 * float(expected.norm())


def test_a_model_whose_attention_mixes_documents_is_not_packed():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=1000, hidden_size=16, num_hidden_layers=1, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    attached = attach_loss(model)
    assert not attached.packs
    assert attached.packing.startswith("off: ")


@pytest.fixture(scope="module")
def chats(tokenizer):
    """Examples of three real chats of 130 tokens and more, and they as one packed micro-batch.

    Below some 64 rows this machine's BLAS takes another way, 7e-5 off in float32, packed or not.
    """
    import json
    from importlib.resources import files

    from lorakit.data.batching import pack
    from lorakit.data.tokenize.encode import encode
    from lorakit.types import Conversation, Message

    text = (files("lorakit") / "assets" / "demo_train.jsonl").read_text(encoding="utf-8")
    asked = [json.loads(line) for line in text.splitlines()]
    rows = []
    for first, count in ((0, 4), (10, 5), (20, 6)):
        turns = []
        for row in asked[first : first + count]:
            turns += [Message("user", row["instruction"]), Message("assistant", row["response"])]
        rows += encode(tokenizer, Conversation(tuple(turns), Origin("x", len(rows))))
    packed = pack(rows)
    assert len(packed["lengths"]) == 3
    assert min(packed["lengths"]) >= 130
    return rows, packed


def trained_on(model, micro_batches):
    """(summed loss, all gradients as one vector in float64)."""
    model.zero_grad()
    total = 0.0
    for micro in micro_batches:
        loss = model(**micro, use_cache=False).loss_sum
        loss.backward()
        total += loss.item()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
    return total, torch.cat(gradients)


def far(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("engine", ["on", "off"])
def test_packed_chats_train_smollm2_as_single_ones_do(demo_model, chats, engine):
    """Its first ten layers. All thirty, measured: fast layers 2e-7 apart, PEFT's own 3e-6."""
    rows, packed = chats
    model = model_of(demo_model)
    inner = base_of(model).get_decoder()
    del inner.layers[10:]
    attached = attach_loss(model, engine)
    assert (attached.engine is not None) == (engine == "on")
    alone = trained_on(model, [collate([row], 0) for row in rows])
    loss, found = trained_on(model, [packed])
    assert loss == pytest.approx(alone[0], rel=1e-5)
    assert far(found, alone[1]) <= 1e-5
