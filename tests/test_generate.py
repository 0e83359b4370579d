"""Answers come whole or in pieces, alone or in batches, and the base can be asked at any time."""

import threading
from dataclasses import replace

import pytest
import torch
from tests.made_runs import LIMIT, answer

from lorakit.data.template import stop_token_ids
from lorakit.errors import DataError, WorkError
from lorakit.generate import GenerationSettings, base_answers, fit_prompt, replies, stream_reply
from lorakit.model.load import load_run
from lorakit.records import Message

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0)


def ask(text):
    return [Message("user", text)]


@pytest.fixture(scope="module")
def real(demo_model):
    """SmolLM2 in float32: along the answers below its best token leads by 0.08 nats or more."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


def test_a_batch_answers_like_one_by_one_and_like_the_stream(real, tokenizer):
    questions = [ask("What is the capital of France?"), ask("Say hi."), ask("2+2=?")]
    together = replies(real, tokenizer, questions, GREEDY)
    assert together == [replies(real, tokenizer, [q], GREEDY)[0] for q in questions]
    assert together[0] == "The capital of France is Paris."
    pieces = list(stream_reply(real, tokenizer, questions[0], GREEDY))
    assert "".join(pieces).strip() == together[0]
    assert len(pieces) > 3


def test_generation_ends_at_the_end_of_turn_and_leaves_no_mark(real, tokenizer):
    real.train()
    assert stop_token_ids(tokenizer, real.generation_config) == [tokenizer.eos_token_id]
    (answer,) = replies(real, tokenizer, [ask("What is the capital of France?")], GREEDY)
    assert "<|im_end|>" not in answer
    assert real.training
    real.eval()


def test_leaving_the_stream_ends_its_thread(talker, tokenizer):
    """The answer has no end: only who leaves ends it."""
    from transformers import AutoModelForCausalLM

    model, before = AutoModelForCausalLM.from_pretrained(talker), set(threading.enumerate())
    endless = GenerationSettings(max_new_tokens=LIMIT - 1000, temperature=0.0)
    stream = stream_reply(model, tokenizer, ask("What color is box 3?"), endless)
    said = "".join(next(stream) for _ in range(3))
    assert said.strip() == answer("base", 3, len(said.split()))
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    assert not any(thread.is_alive() for thread in started)


def test_a_failure_inside_generation_reaches_the_reader(real, tokenizer):
    broken = GenerationSettings(max_new_tokens=5, repetition_penalty=-1.0)
    with pytest.raises(ValueError, match="penalty"):
        list(stream_reply(real, tokenizer, ask("hi"), broken))


def test_a_seed_repeats_a_sampled_answer(real, tokenizer):
    settings = GenerationSettings(max_new_tokens=8, temperature=1.5, seed=3)
    first, second = (replies(real, tokenizer, [ask("Tell me a joke.")], settings) for _ in "ab")
    assert first == second
    other = replies(real, tokenizer, [ask("Tell me a joke.")], replace(settings, seed=4))
    assert first != other


def test_old_turns_make_room_and_a_question_too_long_is_an_error(tiny_model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)  # reads 512 tokens
    turns = []
    for i in range(40):
        turns += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    turns.append(Message("user", "last"))
    ids, dropped = fit_prompt(model, tokenizer, [Message("system", "S"), *turns], GREEDY)
    assert len(ids) <= 512 - 12
    assert dropped > 0
    assert dropped % 2 == 0
    text = tokenizer.decode(ids)
    assert "system\nS" in text
    assert "question 0<" not in text
    assert "last" in text
    with pytest.raises(DataError, match="this model reads 512"):
        fit_prompt(model, tokenizer, ask("word " * 600), GREEDY)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_is_the_model_without_its_adapter(finish, tokenizer, method):
    from transformers import AutoModelForCausalLM

    loaded = load_run(finish(method).run)
    ids = torch.tensor([[5, 99, 1000, 7]], device=loaded.device.kind)
    with torch.no_grad():
        tuned = loaded.model(input_ids=ids).logits
        with base_answers(loaded.model):
            base = loaded.model(input_ids=ids).logits
        again = loaded.model(input_ids=ids).logits
    assert torch.equal(tuned, again)
    assert not torch.equal(tuned, base)
    if method == "lora":
        recipe = loaded.recipe
        plain = AutoModelForCausalLM.from_pretrained(
            (loaded.run.path / recipe.model).resolve(), dtype=getattr(torch, recipe.dtype)
        ).to(loaded.device.kind)
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, base)


def test_trained_biases_do_not_leak_into_the_base():
    """peft's own switch leaves them on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorakit.model.adapters import add_adapter
    from lorakit.recipe import Recipe

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    recipe = Recipe(model="m", data="d", target_modules=["q_proj", "v_proj"], bias="all")
    model = add_adapter(base, recipe).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, before)
        with base_answers(model):
            assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(model(input_ids=ids).logits, before)


def test_memory_that_ends_makes_smaller_batches_of_the_same_answers(real, tokenizer):
    """The allocator really refuses: above two prompts, then above none."""
    questions = [ask("What is the capital of France?"), ask("Say hi."), ask("2+2=?")] * 2
    settings = GenerationSettings(max_new_tokens=3, temperature=0.0)
    whole, room, seen = replies(real, tokenizer, questions, settings), 2, []

    def hook(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > room:
            torch.empty(2**50, dtype=torch.uint8)

    handle = real.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        assert replies(real, tokenizer, questions, settings) == whole
        assert sorted(set(seen)) == [1, 3, 6]
        room = 0
        words = r"out of memory answering a prompt of \d+ tokens with up to 3 more: .* asked for"
        with pytest.raises(WorkError, match=words):
            replies(real, tokenizer, questions, settings)
        with pytest.raises(WorkError, match=words):
            list(stream_reply(real, tokenizer, questions[0], settings))
    finally:
        handle.remove()
