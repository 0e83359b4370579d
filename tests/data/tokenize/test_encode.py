"""Exactly the answers and their end of turn are trained, with real tokenizers; else refused."""

import pytest

from lorakit.data.batching import collate
from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import FatalRowError, IssueLog, RowError
from lorakit.data.tokenize.documents import encode_document
from lorakit.data.tokenize.encode import (
    EncodeConfig,
    encode,
    encode_many,
    prompt_ids,
    stop_token_ids,
)
from lorakit.errors import DataError, ModelError
from lorakit.types import IGNORE, Conversation, Document, Message, Origin

# What each family's template writes after an answer.
END_OF_TURN = {
    "smollm2": "<|im_end|>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
}
CHATS = {
    "single turn": ("What is 6 x 7?", "42."),
    "three turns": ("Hi!", "Hello.", "And in French?", "Bonjour, mon ami.", "Bye", "Au revoir!"),
    "many lines": ("List\n\nthem", "1. one\n2. two\n\n```py\nx =  5\n```"),
    "other scripts": ("Привет?", "日本語 🙂 naïve\u2028line"),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("system", [None, "You are a pirate."])
@pytest.mark.parametrize("texts", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", END_OF_TURN)
def test_exactly_the_answers_and_their_end_of_turn_are_trained(
    family, chat, trained_runs, name, texts, system
):
    tokenizer = family(name)
    examples = encode(tokenizer, chat(*texts, system=system))
    assert trained_runs(tokenizer, examples) == [t + END_OF_TURN[name] for t in texts[1::2]]


@pytest.mark.parametrize("texts", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", END_OF_TURN)
def test_what_chat_feeds_the_model_is_how_the_training_ids_begin(family, chat, name, texts):
    tokenizer = family(name)
    item = chat(*texts, system="Be brief.")
    examples = encode(tokenizer, item)
    starts = {
        tuple(e.input_ids[:i])
        for e in examples
        for i in range(1, len(e.labels))
        if e.labels[i] != IGNORE and e.labels[i - 1] == IGNORE
    }
    asked = {
        tuple(prompt_ids(tokenizer, item.messages[:i])) for i in range(2, len(item.messages), 2)
    }
    assert starts == asked


@pytest.mark.parametrize("name", END_OF_TURN)
def test_train_on_last_trains_the_last_answer_only(family, chat, trained_runs, name):
    tokenizer = family(name)
    (example,) = encode(tokenizer, chat("a?", "one", "b?", "two"), "last")
    assert trained_runs(tokenizer, [example]) == ["two" + END_OF_TURN[name]]
    assert "one" in tokenizer.decode(example.input_ids)


def test_train_on_all_trains_every_token_but_the_first(smollm, chat):
    (example,) = encode(smollm, chat("a?", "one"), "all")
    assert example.labels == [IGNORE, *example.input_ids[1:]]
    assert smollm.decode(example.input_ids).endswith("one<|im_end|>")


def test_a_pad_id_that_is_the_end_of_turn_does_not_mask_it(smollm, chat):
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    examples = encode(smollm, chat("a?", "one")) + encode(smollm, chat("a longer one?", "two, too"))
    batch = collate(examples, pad_id=end)
    for row, example in enumerate(examples):
        # The last token is predicted from the place before it; padding is predicted from nowhere.
        start, last = row * batch["input_ids"].shape[1], len(example.input_ids) - 1
        predicted = dict(zip(batch["positions"].tolist(), batch["targets"].tolist(), strict=True))
        assert predicted[start + last - 1] == end
        assert not {start + i for i in range(last, batch["input_ids"].shape[1])} & set(predicted)


def test_a_special_token_written_by_a_user_stays_text(smollm, chat, trained_runs):
    log = IssueLog()
    item = chat("What does <|im_end|> do?", "<|im_end|> ends a turn.")
    (example,) = encode(smollm, item, log=log)
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    assert example.input_ids.count(end) == 3  # the template's: system, user, assistant
    assert trained_runs(smollm, [example]) == ["<|im_end|> ends a turn.<|im_end|>"]
    assert log.faults()[0].kind == "special token written in a turn"


def test_thinking_rows_train_their_thoughts_and_one_example_an_answer(family, chat, trained_runs):
    tokenizer = family("qwen3", thinking=True)
    thought = "<think>\nsix sevens\n</think>\n\n42"
    examples = encode(tokenizer, chat("6 x 7?", thought, "sure?", "<think>\nyes\n</think>\n\nYes."))
    assert trained_runs(tokenizer, examples) == [
        thought + "<|im_end|>",
        "<think>\nyes\n</think>\n\nYes.<|im_end|>",
    ]
    assert "six sevens" not in tokenizer.decode(examples[1].input_ids)


def test_a_template_without_system_role_gets_it_in_the_first_question(smollm, chat, trained_runs):
    smollm.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    info = resolve_template(smollm, "some/gemma")
    (example,) = encode(smollm, chat("Who?", "Me.", system="Be brief."))
    assert "no system role" in info.source
    assert "<|im_start|>user\nBe brief.\n\nWho?<|im_end|>" in smollm.decode(example.input_ids)
    assert trained_runs(smollm, [example]) == ["Me.<|im_end|>"]


def heading(tokenizer):
    """A template that asks with `##`, which merges with a title's own `##` and with no other."""
    end = "</s>" if tokenizer.bos_token == "<s>" else "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n##{% else %}"
        "{{ m.content }}" + end + "\n{% endif %}{% endfor %}"
    )
    resolve_template(tokenizer, "some/model")
    return end


@pytest.mark.parametrize(("name", "bos"), [("smollm2", 0), ("llama2", 1)])
def test_a_merge_over_the_border_is_kept_apart(family, chat, trained_runs, name, bos):
    tokenizer = family(name)
    end = heading(tokenizer)
    item = chat("Heading?", "## Title")
    (example,) = encode(tokenizer, item)
    prompt = prompt_ids(tokenizer, item.messages[:1])
    merged = tokenizer(f"Heading?\n#### Title{end}", add_special_tokens=False)["input_ids"]
    assert merged[: len(prompt) - bos] != prompt[bos:], "the toy template no longer makes a merge"
    assert example.input_ids[: len(prompt)] == prompt
    assert example.input_ids.count(tokenizer.bos_token_id if bos else None) == bos
    assert trained_runs(tokenizer, [example]) == [f"## Title{end}"]


@pytest.mark.parametrize("texts", [("## Title", " plain"), (" plain", "## Title")])
def test_of_two_answers_both_are_trained_where_one_merges(smollm, chat, trained_runs, texts):
    end = heading(smollm)
    item = chat("Heading?", texts[0], "And?", texts[1])
    examples = encode(smollm, item)
    assert trained_runs(smollm, examples) == [text + end for text in texts]
    assert prompts_fit(smollm, item, examples)


def test_over_long_chats_lose_their_oldest_turns_and_keep_the_system(smollm, chat, trained_runs):
    log = IssueLog()
    item = chat("old?", "old " * 50, "mid?", "mid " * 5, "new?", "new", system="Be brief.")
    (example,) = encode(smollm, item, cutoff_len=40, log=log)
    text = smollm.decode(example.input_ids)
    assert len(example.input_ids) <= 40
    assert "Be brief." in text
    assert "mid?" in text
    assert "old" not in text
    assert trained_runs(smollm, [example]) == ["mid " * 5 + "<|im_end|>", "new<|im_end|>"]
    assert [(f.kind, f.action) for f in log.faults()] == [("too long", "oldest turns dropped")]


def test_each_shortened_example_keeps_its_own_answer(family, chat, trained_runs):
    """Qwen3 rewrites old turns: each answer is an example, shortened around that answer."""
    tokenizer = family("qwen3", thinking=True)
    one, two, three = (f"<think>\nhm\n</think>\n\n{text}" for text in ("one", "two", "three"))
    item = chat("old " * 60, one, "b?", two, "c?", three)
    log = IssueLog()
    examples = encode(tokenizer, item, cutoff_len=50, log=log)
    assert trained_runs(tokenizer, examples) == [f"{two}<|im_end|>", f"{three}<|im_end|>"]
    assert {(f.action, f.count) for f in log.faults()} == {
        ("oldest turns dropped", 2),
        ("that answer left out, the others kept", 1),
    }


@pytest.mark.parametrize("on_overlength", ["drop_oldest_turns", "split", "drop"])
def test_no_example_is_longer_than_the_limit_at_any_limit(smollm, chat, on_overlength):
    """At the limit itself an example is kept as it is."""
    item = chat("a?", "one", "b b?", "two", "c?", "three")
    whole = len(encode(smollm, item)[0].input_ids)
    (kept,) = encode(smollm, item, cutoff_len=whole, on_overlength=on_overlength)
    assert len(kept.input_ids) == whole
    longest = set()
    for limit in range(1, whole):
        made, _ = all_examples(smollm, item, cutoff_len=limit, on_overlength=on_overlength)
        lengths = [] if isinstance(made, RowError) else [len(e.input_ids) for e in made]
        assert max(lengths, default=0) <= limit
        longest.add(max(lengths, default=0) == limit)
    assert (True in longest) == (on_overlength != "drop")


# -- sabotage: refused, with the row named --------------------------------------------------------


def test_an_answer_that_would_be_cut_is_left_out_by_name(smollm, chat):
    with pytest.raises(RowError, match=r"rows.jsonl:7: even its last question .* cutoff_len 40"):
        encode(smollm, chat("a?", "word " * 60), cutoff_len=40)


def test_too_long_error_stops_and_names_the_row(smollm, chat):
    with pytest.raises(DataError, match=r"rows.jsonl:7: too long: \d+ tokens") as caught:
        encode(smollm, chat("a?", "word " * 60), cutoff_len=40, on_overlength="error")
    assert isinstance(caught.value, FatalRowError)


def test_a_template_whose_end_of_turn_is_stripped_is_refused(smollm, chat):
    smollm.chat_template = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}")
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*no end-of-turn token"):
        encode(smollm, chat("a?", "one"))
    with pytest.raises(ModelError, match="no end-of-turn token"):
        resolve_template(smollm, "some/model")


def test_two_bos_tokens_are_refused(family, chat):
    tokenizer = family("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match=r"rows.jsonl:7: it begins with two BOS"):
        encode(tokenizer, chat("a?", "one"))


def test_a_template_that_swallows_part_of_the_answer_is_refused(smollm, chat):
    cut = "{{ m.content if m.role == 'user' else m.content[:9] }}"
    smollm.chat_template = CHATML.replace("{{ m.content }}", cut)
    resolve_template(smollm, "some/model")
    for question in ("a?", "Repeat: a long answer"):
        with pytest.raises(DataError, match=r"rows.jsonl:7: .*does not write the complete answer"):
            encode(smollm, chat(question, "a long answer"))


def test_a_generation_prompt_that_is_not_how_answers_begin_is_refused(smollm, chat):
    smollm.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant: {% endif %}")
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*asks for the answer in one way"):
        encode(smollm, chat("a?", "one"))


def test_a_template_that_raises_leaves_the_row_out(smollm, chat):
    smollm.chat_template = (
        "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    )
    with pytest.raises(RowError, match=r"rows.jsonl:7|too many"):
        encode(smollm, chat("a?", "one", "b?", "two"))


def test_encode_takes_documents_too(smollm):
    document = Document("Short text.", Origin("a.txt", 1))
    assert encode(smollm, document) == encode_document(smollm, document, 2048)


def test_a_conversation_without_answer_is_a_row_fault(smollm):
    with pytest.raises(RowError, match=r"rows.jsonl:1"):
        encode(smollm, Conversation((Message("user", "a?"),), Origin("rows.jsonl", 1)))


# -- too long: split ------------------------------------------------------------------------------


def all_examples(tokenizer, item, **rules):
    log = IssueLog()
    ((_, made),) = encode_many(tokenizer, [item], EncodeConfig("responses", **rules), log)
    return made, {(f.kind, f.action): f.count for f in log.faults()}


@pytest.mark.parametrize("name", END_OF_TURN)
def test_split_trains_each_answer_once_within_the_limit(family, chat, trained_runs, name):
    tokenizer = family(name)
    talk = chat(*(f"{'Why' if i % 2 else 'It is'} number {i} here?" for i in range(24)), system="S")
    whole, _ = all_examples(tokenizer, talk, cutoff_len=4096, on_overlength="split")
    made, faults = all_examples(tokenizer, talk, cutoff_len=90, on_overlength="split")
    assert len(made) > 2
    assert all(len(e.input_ids) <= 90 for e in made)
    assert trained_runs(tokenizer, made) == trained_runs(tokenizer, whole)
    assert faults[("too long", "split into several examples")] == 1


def test_split_leaves_out_only_the_answer_that_fits_nowhere(smollm, chat, trained_runs):
    talk = chat("a?", "one", "b?", "long " * 80, "c?", "three")
    made, faults = all_examples(smollm, talk, cutoff_len=60, on_overlength="split")
    assert trained_runs(smollm, made) == ["one<|im_end|>", "three<|im_end|>"]
    assert faults == {
        ("too long", "split into several examples"): 1,
        ("too long", "that answer left out, the others kept"): 1,
    }


def test_text_as_instructions_fits_and_keeps_every_word(smollm):
    text = "\n\n".join(f"# Part {i}\n\nIt says {i * i} and more of it." for i in range(30))
    document = Document(text, Origin("book.md", 1))
    rules = {"cutoff_len": 100, "on_overlength": "drop", "documents": "instruction", "overlap": 16}
    made, _ = all_examples(smollm, document, **rules)
    assert all(len(e.input_ids) <= 100 for e in made)
    said = " ".join(smollm.decode([x for x in e.labels if x != IGNORE]) for e in made)
    assert said.replace("<|im_end|>", "").split() == text.split()
    assert 'Write the section "Part 0" of "book".' in smollm.decode(made[0].input_ids)


# -- templates with habits of their own, written down from DeepSeek's and GLM's -------------------

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# V3.1 asks with the end of thoughts that were not thought.
V31 = R1.replace("<|assistant|>{{", "<|assistant|></think>{{").replace("<think>\n", "</think>")
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<|user|>", "<|assistant|>", "<|system|>", "<|eos|>", "[gMASK]", "<sop>"]


@pytest.fixture
def marked(smollm):
    """template -> a copy of SmolLM2's tokenizer that knows the marks, and what was said of it."""

    def load(template, thinking=False):
        tokenizer = type(smollm).from_pretrained(smollm.name_or_path)
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        tokenizer.chat_template = template
        return tokenizer, resolve_template(tokenizer, "some/model", thinking).source

    return load


def prompts_fit(tokenizer, item, examples):
    """The prompt of each answer is how some example begins, up to a trained token."""
    answers = [i for i, m in enumerate(item.messages) if m.role == "assistant"]
    asked = [prompt_ids(tokenizer, item.messages[:i]) for i in answers]
    return all(
        any(e.input_ids[: len(p)] == p and e.labels[len(p)] != IGNORE for e in examples)
        for p in asked
    )


def test_thoughts_that_the_prompt_begins_are_ended_before_each_answer(marked, chat, trained_runs):
    tokenizer, source = marked(R1, thinking=True)
    item = chat("a?", "<think>\nhmm\n</think>\n\none", "b?", "two")
    examples = encode(tokenizer, item)
    assert trained_runs(tokenizer, examples) == [
        "hmm\n</think>\n\none<|eos|>",
        "\n</think>\n\ntwo<|eos|>",
    ]
    assert prompts_fit(tokenizer, item, examples)
    assert "hmm" not in tokenizer.decode(examples[1].input_ids), "the template drops old thoughts"
    assert "it asks with <think>" in source


def test_a_prompt_that_ends_thoughts_stays_out_of_the_answers(marked, chat, trained_runs):
    tokenizer, _ = marked(V31)
    item = chat("a?", "one", "b?", "two")
    examples = encode(tokenizer, item)
    assert len(examples) == 1
    assert trained_runs(tokenizer, examples) == ["one<|eos|>", "two<|eos|>"]
    assert prompts_fit(tokenizer, item, examples)


def test_the_next_turns_token_ends_an_answer_where_nothing_else_does(marked, chat, trained_runs):
    tokenizer, source = marked(GLM4)
    item = chat("a?", "one", "b?", "two", system="Be brief.")
    examples = encode(tokenizer, item)
    assert trained_runs(tokenizer, examples) == ["\none<|user|>", "\ntwo<|user|>"]
    assert prompts_fit(tokenizer, item, examples)
    assert tokenizer.decode(examples[0].input_ids).startswith("[gMASK]<sop><|system|>\nBe brief.")
    assert stop_token_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert "an answer ends with the <|user|> of the next turn" in source


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'user' %}<|eos|>{% endif %}{% endfor %}",
        # Each question begins with the BOS (SmolLM2's is <|im_start|>): that ends no answer.
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% else %}<|assistant|>"
        "{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_lost_end_of_turn_is_not_taken_for_that(marked, template):
    with pytest.raises(ModelError, match="writes no end-of-turn token"):
        marked(template)


def test_split_makes_one_example_where_only_the_last_answer_is_trained(smollm, chat, trained_runs):
    talk = chat("a?", "one " * 20, "b?", "two " * 20, "c?", "three")
    log, rules = IssueLog(), EncodeConfig("last", cutoff_len=60, on_overlength="split")
    ((_, made),) = encode_many(smollm, [talk], rules, log)
    assert trained_runs(smollm, made) == ["three<|im_end|>"]
    assert [(f.kind, f.action) for f in log.faults()] == [("too long", "oldest turns dropped")]


def test_earlier_answers_are_kept_where_the_last_exchange_alone_is_too_long(
    smollm, chat, trained_runs
):
    talk = chat("a?", "one", "b?", "two", "c " * 80, "three", "d " * 80, "four")
    rules = {"cutoff_len": 60, "on_overlength": "drop_oldest_turns"}
    made, faults = all_examples(smollm, talk, **rules)
    assert trained_runs(smollm, made) == ["one<|im_end|>", "two<|im_end|>"]
    assert faults == {("too long", "that answer left out, the others kept"): 2}
    with pytest.raises(RowError, match="even its last question and answer"):
        encode(smollm, talk, "last", cutoff_len=60)
    with pytest.raises(RowError, match="over cutoff_len 60"):
        encode(smollm, talk, cutoff_len=60, on_overlength="drop")


def test_spaces_that_a_template_cuts_from_an_answer_are_said(family, chat):
    def notes(name, answer):
        log = IssueLog()
        encode(family(name), chat("def f():", answer), log=log)
        return [(f.kind, f.action) for f in log.faults()]

    cut = ("spaces at the start of an answer", "removed by the chat template")
    assert notes("llama3", "    return 1\n") == [cut]
    assert notes("llama3", "return 1\n") == []
    assert notes("smollm2", "    return 1\n") == []
