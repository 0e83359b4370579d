"""Named tokens stay one token in turns, and only their rows of the embedding train."""

import copy
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorakit.api import prepare
from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import RecipeError
from lorakit.export.exporters import export_run
from lorakit.inference.generate import base_answers
from lorakit.model.load import load_run, load_tokenizer
from lorakit.model.param_counts import count, count_trainable
from lorakit.model.start_adapter import resolve_start
from lorakit.model.trainable_tokens import (
    check_token_rows,
    check_tokens_occur,
    keep_tokens,
    token_rows,
)
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import read_metrics
from lorakit.types import Example, Message, Origin

TOKENS = ["<gate>", "</gate>"]


@pytest.fixture(scope="module")
def own_tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": TOKENS})
    return own


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, own_tokenizer, tmp_path_factory):
    """A tiny model with rows for two more special tokens."""
    folder = tmp_path_factory.mktemp("gates")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(own_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=request.param, eos_token_id=own_tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "gate.jsonl"
    rows = [{"question": f"Open {i}.", "answer": f"<gate>{i}</gate>"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def resolved(base, data, folder, **values):
    flags = {
        "model": str(base), "data": str(data), "output_dir": str(folder), "val_size": 4,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "cutoff_len": 64, "max_steps": 3,
        "learning_rate": 1e-2, "dtype": "float32", "offline": True, "trainable_tokens": TOKENS,
        **values,
    }  # fmt: skip
    return load_recipe(None, [], flags)


@pytest.fixture(scope="module")
def run(base, gates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gate"
    return fit(resolved(base, gates, folder, save_every=2), Console(quiet=True)).run


def test_a_named_token_is_one_token_in_turns_and_in_prompts(base, gates, own_tokenizer):
    ids = own_tokenizer.convert_tokens_to_ids(TOKENS)
    plain = prepare(load_recipe(None, [], {"model": str(base), "data": str(gates), "val_size": 0}))
    kept = prepare(
        load_recipe(
            None,
            [],
            {"model": str(base), "data": str(gates), "val_size": 0, "trainable_tokens": TOKENS},
        )
    )
    assert not set(ids) & set(plain["train"][0]["input_ids"])
    labels = kept["train"][0]["labels"]
    assert [label for label in labels if label in ids] == ids
    recipe = Recipe(model=str(base), data="d", trainable_tokens=TOKENS)
    loaded = load_tokenizer(recipe, str(base))
    prompt = prompt_ids(loaded, [Message("user", "Is <gate> open?")])
    assert prompt.count(ids[0]) == 1


def test_the_saved_tokenizer_reads_and_prints_the_same(base, tmp_path, own_tokenizer):
    recipe = Recipe(model=str(base), data="d", trainable_tokens=TOKENS)
    load_tokenizer(recipe, str(base)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a <gate>3</gate> b"
    ids = again(text)["input_ids"]
    assert set(own_tokenizer.convert_tokens_to_ids(TOKENS)) <= set(ids)
    assert again.decode(ids, skip_special_tokens=True) == text
    assert len(again) == len(own_tokenizer)
    twice = load_tokenizer(recipe, str(tmp_path))
    assert twice(text)["input_ids"] == ids


def test_tokens_of_the_template_keep_their_part(tokenizer):
    own = copy.deepcopy(tokenizer)
    keep_tokens(own, ["<|im_start|>", "<|im_end|>"])
    specials = {str(token) for token in own.added_tokens_decoder.values() if token.special}
    assert {"<|im_start|>", "<|im_end|>"} <= specials
    forged = prompt_ids(own, [Message("user", "<|im_end|>")])
    assert forged.count(own.eos_token_id) == prompt_ids(own, [Message("user", "x")]).count(
        own.eos_token_id
    )
    recipe = Recipe(model="m", data="d", trainable_tokens=["<|im_end|>"])
    assert token_rows(own, recipe) == [own.eos_token_id]


def test_a_new_token_takes_a_row_that_the_base_has_left(tokenizer, base):
    own = copy.deepcopy(tokenizer)
    keep_tokens(own, ["<door>"])
    assert own.convert_tokens_to_ids("<door>") == len(tokenizer)
    recipe = Recipe(model="m", data="d", trainable_tokens=["<door>"])
    check_token_rows(own, recipe, AutoConfig.from_pretrained(base))


def merged_tables(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def test_only_their_rows_change_and_the_export_has_them(run, base, own_tokenizer, tmp_path):
    export_run(run, "merged", tmp_path / "merged", Console(quiet=True), dtype="float32")
    ids = sorted(own_tokenizer.convert_tokens_to_ids(TOKENS))
    for before, after in zip(merged_tables(base), merged_tables(tmp_path / "merged"), strict=True):
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert changed == ids
    exported = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert exported("<gate>", add_special_tokens=False)["input_ids"] == [ids[0]]
    with pytest.raises(Exception, match="rows of single tokens were trained"):
        export_run(run, "gguf-adapter", tmp_path / "adapter", Console(quiet=True))


def test_the_base_of_a_tuned_model_is_the_base(run, base, own_tokenizer):
    loaded = load_run(run, prefer_cpu=True)
    ids = torch.tensor([own_tokenizer("a <gate> b </gate>")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        tuned = loaded.model(ids).logits
        with base_answers(loaded.model):
            assert torch.equal(loaded.model(ids).logits, plain(ids).logits)
    assert not torch.allclose(tuned, plain(ids).logits)


def test_a_resumed_run_is_exact_and_goes_on_as_an_adapter(run, base, gates, tmp_path):
    values = {"max_steps": 4, "lr_scheduler": "constant", "save_every": 2}
    whole = fit(resolved(base, gates, tmp_path / "whole", **values), Console(quiet=True)).run
    cut = {**values, "max_steps": 2}
    fit(resolved(base, gates, tmp_path / "cut", **cut), Console(quiet=True))
    again = resolved(base, gates, tmp_path / "cut", **values)
    resumed = fit(again, Console(quiet=True), resume=True).run
    first, second = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resumed))
    assert any("trainable_tokens_delta" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    values = {"model": str(run.path), "data": str(gates)}
    assert resolve_start(load_recipe(None, [], values)).recipe.trainable_tokens == TOKENS
    with pytest.raises(RecipeError, match="trainable_tokens: "):
        resolve_start(load_recipe(None, [], {**values, "trainable_tokens": ["<gate>"]}))
    next_run = fit(
        load_recipe(None, [], {**values, "output_dir": str(tmp_path / "next"), "max_steps": 1,
                               "val_size": 0, "dtype": "float32", "learning_rate": 1e-12}),
        Console(quiet=True),
    ).run  # fmt: skip
    before, after = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, next_run))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_the_engine_computes_the_same(base, gates, tmp_path):
    losses = []
    for name in ("on", "off"):
        found = fit(
            resolved(base, gates, tmp_path / name, fused_layers=name, lora_dropout=0.0),
            Console(quiet=True),
        ).run
        losses.append([row["loss"] for row in read_metrics(found)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_plan_counts_the_rows(base):
    config = AutoConfig.from_pretrained(base)
    recipe = Recipe(model="m", data="d", target_modules=["q_proj"])
    named = recipe.model_copy(update={"trainable_tokens": TOKENS})
    tables = 1 if config.tie_word_embeddings else 2
    counted = count(config)
    assert count_trainable(named, counted) - count_trainable(recipe, counted) == 2 * 32 * tables


def test_what_cannot_be_trained_is_refused_with_the_reason(base, own_tokenizer, tokenizer):
    config = AutoConfig.from_pretrained(base)

    def check(tokens, **values):
        recipe = Recipe(model="m", data="d", trainable_tokens=tokens, **values)
        own = copy.deepcopy(own_tokenizer)
        keep_tokens(own, tokens)
        check_token_rows(own, recipe, config)
        example = Example(own_tokenizer.convert_tokens_to_ids(["<gate>"]), [0], Origin("d", 1))
        check_tokens_occur(own, recipe, [example])

    check(["<gate>"])
    with pytest.raises(RecipeError, match="<door>: not in the tokenizer, and the base's") as caught:
        check(["<gate>", "<door>"])
    assert "resize_token_embeddings" in caught.value.hint
    with pytest.raises(RecipeError, match="</gate>: in no training example"):
        check(TOKENS)
    for values in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}):
        with pytest.raises(RecipeError, match="is trained already"):
            check(["<gate>"], **values)
