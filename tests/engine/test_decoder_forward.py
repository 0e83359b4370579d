"""`lorakit.accelerate` changes nothing that a training script computes."""

import copy

import pytest
import torch
from tests.engine.engine_models import tiny

import lorakit
from lorakit.engine.attach import Engine
from lorakit.errors import ModelError


@pytest.fixture
def calls(monkeypatch):
    """Lengths of the rows that went through the fused layers."""
    made, plain = [], Engine.__call__

    def call(engine, inputs, segments):
        made.append(segments.lengths if segments else None)
        return plain(engine, inputs, segments)

    monkeypatch.setattr(Engine, "__call__", call)
    return made


def batch(rows=2, length=12, seed=0):
    ids = torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, length - 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, **inputs):
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_loss_and_gradients_are_the_models_own(family, calls):
    model = tiny(family)
    inputs = batch()
    expected, own = gradients(model, **inputs)
    assert "fused layers" in lorakit.accelerate(model, "on")
    loss, found = gradients(model, **inputs)
    assert calls == [None]
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_packed_rows_and_activation_checkpointing(calls):
    model = tiny("llama")
    ids = batch(1, 12)["input_ids"]
    places = torch.tensor([[*range(5), *range(7)]])
    # With a cache, transformers does not tell packed documents apart.
    inputs = {"input_ids": ids, "position_ids": places, "labels": ids, "use_cache": False}
    expected, own = gradients(copy.deepcopy(model), **inputs)
    lorakit.accelerate(model, "on")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss, found = gradients(model, **inputs)
    assert calls == [(5, 7)]
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["left padding", "two packed rows", "a cache", "evaluation"])
def test_other_calls_go_through_the_models_own_layers(case, calls):
    model = tiny("llama")
    inputs = batch()
    if case == "left padding":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    elif case == "two packed rows":
        inputs["attention_mask"] = None
        inputs["position_ids"] = torch.tensor([[*range(5), *range(7)]] * 2)
    plain = copy.deepcopy(model).eval()
    lorakit.accelerate(model, "on")
    model.train(case not in ("a cache", "evaluation"))
    with torch.set_grad_enabled(case not in ("a cache", "evaluation")):
        out = model(**inputs, use_cache=case == "a cache")
    assert calls == []
    assert (out.past_key_values is not None) == (case == "a cache")
    with torch.no_grad():
        expected = plain(**inputs, use_cache=case == "a cache").logits
        torch.testing.assert_close(out.logits.detach(), expected)


def test_what_cannot_be_accelerated_is_said(calls):
    model = tiny("llama")
    with pytest.raises(ModelError, match="expected 'auto' or 'on'"):
        lorakit.accelerate(model, "off")
    with pytest.raises(ModelError, match="expected a PEFT model, found"):
        lorakit.accelerate(model.get_base_model())
    assert lorakit.accelerate(model).startswith("the model's own layers")
    gradients(model, **batch())
    assert calls == []


def test_plain_sft_trainer_on_prepared_data(tiny_model_dir, tiny_data, tmp_path, calls):
    """TRL's own trainer, collator and loss, over `prepare`'s labels and the fused layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = lorakit.prepare(model=str(tiny_model_dir), data=str(tiny_data), val_size=0)["train"]
    assert set(data.column_names) == {"input_ids", "labels", "source", "row"}

    def losses(fused):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        names = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(base, LoraConfig(r=4, target_modules=names))
        if fused:
            lorakit.accelerate(model, "on")
        settings = SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    own = losses(fused=False)
    assert calls == []
    assert losses(fused=True) == pytest.approx(own, rel=1e-4)
    assert len(calls) >= 3
