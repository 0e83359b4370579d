"""Answers come whole or in pieces, alone or in batches, and the base can be asked at any time."""

import threading
from dataclasses import replace

import pytest
import torch
from tests.made_runs import LIMIT, answer

from lorakit.data.tokenize.encode import stop_token_ids
from lorakit.errors import DataError, WorkError
from lorakit.inference.generate import (
    GenerationSettings,
    base_answers,
    fit_prompt,
    replies,
    stream_reply,
)
from lorakit.model.load import load_run
from lorakit.types import Message

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0)


def ask(text):
    return [Message("user", text)]


@pytest.fixture(scope="module")
def real(demo_model):
    """SmolLM2 in float32: along its answer below its best token leads by 0.1 nats or more."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def small(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def talking(talker):
    """A model whose answers are certain; see `made_runs`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(talker)


def test_a_batch_answers_like_one_by_one_and_like_the_stream(talking, real, smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    asked = ("Box 3?", "What color is box 1?", "Which color is the ball in box 8?")
    questions = [ask(text) for text in asked]
    words = [answer("base", digit, 12) for digit in (3, 1, 8)]
    assert replies(talking, tokenizer, questions, GREEDY) == words
    assert [replies(talking, tokenizer, [q], GREEDY)[0] for q in questions] == words
    pieces = list(stream_reply(talking, tokenizer, questions[0], GREEDY))
    assert "".join(pieces).strip() == words[0]
    assert len(pieces) >= 12
    capital = ask("What is the capital of France?")
    assert replies(real, tokenizer, [capital], GREEDY) == ["The capital of France is Paris."]


def test_generation_ends_at_the_end_of_turn_and_leaves_no_mark(real, smollm2_tokenizer):
    real.train()
    tokenizer = smollm2_tokenizer
    assert stop_token_ids(tokenizer, real.generation_config) == [tokenizer.eos_token_id]
    pieces = stream_reply(real, tokenizer, ask("What is the capital of France?"), GREEDY)
    assert "".join(pieces) == "The capital of France is Paris."
    assert real.training
    real.eval()


def test_leaving_the_stream_ends_its_thread(talking, smollm2_tokenizer):
    """The answer has no end: only who leaves ends it."""
    tokenizer = smollm2_tokenizer
    before = set(threading.enumerate())
    endless = GenerationSettings(max_new_tokens=LIMIT - 1000, temperature=0.0)
    stream = stream_reply(talking, tokenizer, ask("What color is box 3?"), endless)
    said = "".join(next(stream) for _ in range(3))
    assert said.strip() == answer("base", 3, len(said.split()))
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    assert not any(thread.is_alive() for thread in started)


def test_a_failure_inside_generation_reaches_the_reader(talking, tokenizer):
    broken = GenerationSettings(max_new_tokens=5, repetition_penalty=-1.0)
    with pytest.raises(ValueError, match="penalty"):
        list(stream_reply(talking, tokenizer, ask("hi"), broken))


def test_a_seed_repeats_a_sampled_answer(tiny_model_dir, tokenizer):
    """Of a random model, to which all tokens are nearly alike."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = GenerationSettings(max_new_tokens=8, temperature=1.5, seed=3)
    first, second = (replies(model, tokenizer, [ask("Tell me a joke.")], settings) for _ in "ab")
    assert first == second
    other = replies(model, tokenizer, [ask("Tell me a joke.")], replace(settings, seed=4))
    assert first != other


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}], ids=lambda n: next(iter(n)))
def test_drawing_from_one_token_is_greedy(small, tokenizer, narrow):
    """However hot: what is left to draw from is the likeliest one."""
    greedy = GenerationSettings(max_new_tokens=6, temperature=0.0)
    hot = {"max_new_tokens": 6, "temperature": 50.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    drawn = GenerationSettings(**{**hot, **narrow})
    questions = [ask("What is the capital of France?"), ask("hi")]
    assert replies(small, tokenizer, questions, drawn) == replies(
        small, tokenizer, questions, greedy
    )
    assert replies(small, tokenizer, questions, GenerationSettings(**hot)) != replies(
        small, tokenizer, questions, greedy
    )


def test_a_model_of_little_context_keeps_half_of_it_for_the_prompt(small, tokenizer):
    long = GenerationSettings(max_new_tokens=500)
    ids, dropped = fit_prompt(small, tokenizer, ask("word " * 100), long)  # 512 - 500 is less
    assert (100 < len(ids) <= 256, dropped) == (True, 0)
    with pytest.raises(DataError, match="context is 512"):
        fit_prompt(small, tokenizer, ask("word " * 260), long)


def test_tools_are_part_of_the_prompt(small, tokenizer, monkeypatch):
    template = "{{ tools | tojson if tools else '' }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tool = {"type": "function", "function": {"name": "open_door", "parameters": {}}}
    with_tools, _ = fit_prompt(small, tokenizer, ask("hi"), GREEDY, (tool,))
    without, _ = fit_prompt(small, tokenizer, ask("hi"), GREEDY)
    assert "open_door" in tokenizer.decode(with_tools)
    assert "open_door" not in tokenizer.decode(without)


def test_old_turns_make_room_and_a_question_too_long_is_an_error(small, tokenizer):
    model = small  # reads 512 tokens
    turns = []
    for i in range(40):
        turns += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
        if i % 2:  # what a tool said goes with its question
            turns += [Message("tool", "found"), Message("assistant", "so")]
    turns.append(Message("user", "last"))
    ids, dropped = fit_prompt(model, tokenizer, [Message("system", "S"), *turns], GREEDY)
    assert len(ids) <= 512 - 12
    text = tokenizer.decode(ids)
    first = next(i for i in range(40) if f"question {i}<" in text)
    assert dropped == turns.index(Message("user", f"question {first}")) > 2
    assert all(f"answer {i}<" in text for i in range(first, 40))
    assert "system\nS" in text
    assert "question 0<" not in text
    assert "last" in text
    with pytest.raises(DataError, match="context is 512"):
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

    from lorakit.model.lora_config import add_adapter
    from lorakit.recipe.schema import Recipe

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


def test_memory_that_ends_makes_smaller_batches_of_the_same_answers(talking, smollm2_tokenizer):
    """The allocator really refuses: above two prompts, then above none."""
    tokenizer = smollm2_tokenizer
    questions = [ask(f"What color is box {i}?") for i in range(6)]
    settings = GenerationSettings(max_new_tokens=3, temperature=0.0)
    room, seen = 2, []

    def hook(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > room:
            torch.empty(2**50, dtype=torch.uint8)

    handle = talking.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        found = replies(talking, tokenizer, questions, settings)
        assert found == [answer("base", i, 3) for i in range(6)]
        assert sorted(set(seen)) == [1, 3, 6]
        room = 0
        words = r"out of memory answering a prompt of \d+ tokens with up to 3 more: .* requested"
        with pytest.raises(WorkError, match=words):
            replies(talking, tokenizer, questions, settings)
        with pytest.raises(WorkError, match=words):
            list(stream_reply(talking, tokenizer, questions[0], settings))
    finally:
        handle.remove()
