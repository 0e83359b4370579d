"""Answers are found in what real templates write; what a template leaves out is refused by name."""

from importlib.resources import files

import pytest

from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import FatalRowError, IssueLog, RowError
from lorakit.data.tokenize.encode import encode, prompt_ids, stop_token_ids
from lorakit.data.tokenize.spans import answer_text, find_spans
from lorakit.types import IGNORE, Conversation, Message, Origin

AT = Origin("rows.jsonl", 7)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CALLS = [
    {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
    }
]
WITH_TOOLS = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Weather in Zürich?"),
        Message("assistant", "", {"tool_calls": CALLS}),
        Message("tool", '{"t": 21}', {"tool_call_id": "abcdefghi", "name": "get_weather"}),
        Message("assistant", "It is 21 degrees."),
        Message("user", "Thanks!"),
        Message("assistant", "You are welcome."),
    ),
    AT,
    (TOOL,),
)
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@pytest.fixture
def templated(family):
    """(family, name of a template that trl ships) -> tokenizer with that template."""

    def load(name, template, marks=()):
        tokenizer = family(name)
        if marks:
            # A copy: added tokens stay.
            tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
            tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
        text = (files("trl") / "chat_templates" / f"{template}.jinja").read_text("utf-8")
        tokenizer.chat_template = text
        resolve_template(tokenizer, f"some/{template}")
        return tokenizer

    return load


CASES = {
    "qwen3": ("qwen3", None, QWEN_CALL, "<|im_end|>"),
    "qwen3, generation blocks": ("qwen3", "qwen3_training", QWEN_CALL, "<|im_end|>"),
    "qwen2.5": ("qwen3", "qwen2_5", QWEN_CALL, "<|im_end|>"),
    "llama-3.1": (
        "llama3",
        "llama3_1",
        '{"name": "get_weather", "parameters": {"city": "Zürich"}}',
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_and_answers_are_trained_and_nothing_of_the_tools(
    family, templated, trained_runs, case
):
    name, template, call, end = CASES[case]
    tokenizer = templated(name, template) if template else family(name)
    examples = encode(tokenizer, WITH_TOOLS)
    expected = [call + end, "It is 21 degrees." + end, "You are welcome." + end]
    assert trained_runs(tokenizer, examples) == expected
    whole = tokenizer.decode(examples[-1].input_ids)
    assert "Weather of a city" in whole
    assert "21}" in whole


@pytest.mark.parametrize("case", CASES)
def test_with_tools_the_prompt_is_how_the_training_ids_begin(family, templated, case):
    name, template, _, _ = CASES[case]
    tokenizer = templated(name, template) if template else family(name)
    examples = encode(tokenizer, WITH_TOOLS)
    starts = {
        tuple(e.input_ids[:i])
        for e in examples
        for i in range(1, len(e.labels))
        if e.labels[i] != IGNORE and e.labels[i - 1] == IGNORE
    }
    turns = WITH_TOOLS.messages
    assert starts == {tuple(prompt_ids(tokenizer, turns[:i], (TOOL,))) for i in (2, 4, 6)}


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_a_template_that_writes_no_tools_is_refused_by_name(family, name):
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*omits tool schemas and tool calls"):
        encode(family(name), WITH_TOOLS)
    without = Conversation(WITH_TOOLS.messages, AT)
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*omits tool calls"):
        encode(family(name), without)
    schemas = Conversation((Message("user", "a"), Message("assistant", "b")), AT, (TOOL,))
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*omits tool schemas") as caught:
        encode(family(name), schemas)
    assert "Qwen3" in caught.value.hint


def test_a_template_that_drops_tool_results_refuses_the_rows_that_have_some(smollm, trained_runs):
    """The answer after a result would be trained without what it rests on."""
    smollm.chat_template = (
        "{{ tools or '' }}{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*template omits tool results\n"):
        encode(smollm, WITH_TOOLS)
    calls = Conversation(WITH_TOOLS.messages[:3], AT, (TOOL,))
    (run,) = trained_runs(smollm, encode(smollm, calls))
    assert "get_weather" in run


def test_a_template_that_raises_on_tools_is_refused_by_name(family):
    turns = [
        Message("user", "Weather?"),
        Message("assistant", "<tool_call>get_weather()</tool_call>"),
        Message("tool", "21"),
        Message("assistant", "21 degrees."),
    ]
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*turns must alternate") as caught:
        encode(family("llama2"), Conversation(tuple(turns), AT))
    assert caught.value.kind == "tool calls refused by the chat template"


def test_a_call_that_the_template_drops_is_refused(templated):
    tokenizer = templated("qwen3", "qwen2_5")
    whole = tokenizer.chat_template
    # Writes the first call of a turn only.
    tokenizer.chat_template = whole.replace(
        "for tool_call in message.tool_calls", "for tool_call in message.tool_calls[:1]"
    )
    assert tokenizer.chat_template != whole
    twice = Message("assistant", "", {"tool_calls": CALLS * 2})
    item = Conversation((Message("user", "a"), twice), AT)
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*does not write the call of get_weather"):
        encode(tokenizer, item)


def test_an_own_end_of_turn_after_calls_is_trained(templated, trained_runs):
    marks = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
    tokenizer = templated("qwen3", "gptoss", marks)
    runs = trained_runs(tokenizer, encode(tokenizer, WITH_TOOLS))
    assert runs[0].endswith('{"city": "Zürich"}<|call|>')
    assert runs[1].endswith("It is 21 degrees.<|return|>")


# -- generation blocks ----------------------------------------------------------------------------

BLOCKS = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{0}"
    "{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def test_glm_ends_calls_and_answers_with_the_next_turns_token(templated, trained_runs):
    marks = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tokenizer = templated("smollm2", "glm4moe", marks)
    call, answer, last = trained_runs(tokenizer, encode(tokenizer, WITH_TOOLS))
    assert "get_weather" in call
    assert call.endswith("</tool_call><|observation|>")
    assert (answer, last) == ("\nIt is 21 degrees.<|user|>", "\nYou are welcome.<|user|>")
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    assert stops == ["<|user|>", "<|observation|>", tokenizer.eos_token]


def blocks(tokenizer, answer):
    tokenizer.chat_template = BLOCKS.format(answer)
    resolve_template(tokenizer, "some/model")
    return tokenizer


def test_a_generation_block_says_exactly_what_is_trained(smollm, chat, trained_runs):
    tokenizer = blocks(
        smollm, "Note: mine.\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    )
    item = chat("a?", "one", "b?", "two")
    (example,) = encode(tokenizer, item)
    assert trained_runs(tokenizer, [example]) == ["one<|im_end|>", "two<|im_end|>"]
    # Without the block all that stands between prompt and end of turn is trained.
    tokenizer = blocks(smollm, "Note: mine.\n{{ m.content }}<|im_end|>")
    (example,) = encode(tokenizer, item)
    assert trained_runs(tokenizer, [example])[0] == "Note: mine.\none<|im_end|>"


def test_several_blocks_in_one_answer_leave_what_is_between_them_out(smollm, chat, trained_runs):
    tokenizer = blocks(
        smollm,
        "{% generation %}Well{% endgeneration %}\n--\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
    )
    (example,) = encode(tokenizer, chat("a?", "one"))
    assert trained_runs(tokenizer, [example]) == ["Well", "one<|im_end|>"]


def test_what_a_block_leaves_out_is_part_of_its_own_answer(smollm, chat):
    """Blocks of earlier answers do not count."""
    answer = "Note: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    drafted = find_spans(blocks(smollm, answer), chat("a?", "one", "b?", "two"), "responses")
    spans = [span for group in drafted.groups for span in group]
    assert len(spans) == 2
    for span in spans:
        assert [span.text[begin:end] for begin, end in span.gaps] == ["Note: "]


def test_a_block_within_a_block_is_trained_with_all_around_it(smollm, chat, trained_runs):
    answer = (
        "{% generation %}Well{% generation %} then{% endgeneration %}: {{ m.content }}<|im_end|>"
        "{% endgeneration %}"
    )
    (example,) = encode(blocks(smollm, answer), chat("a?", "one"))
    assert trained_runs(smollm, [example]) == ["Well then: one<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>",
        "{{ m.content }}<|im_end|>{% generation %}{% endgeneration %}",
        # Its end of turn is in two parts, of which one is outside.
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_{% generation %}end|>"
        "{% endgeneration %}",
    ],
)
def test_a_block_without_the_end_of_turn_is_refused_by_name(smollm, chat, answer):
    with pytest.raises(FatalRowError, match=r"rows.jsonl:7: .*generation %} block leaves .*im_end"):
        encode(blocks(smollm, answer), chat("a?", "one"))


@pytest.mark.parametrize(
    ("name", "template", "marks"),
    [
        ("qwen3", "qwen2_5_training", ()),
        ("llama3", "llama3_training", ()),
        ("llama2", "gemma_training", ("<start_of_turn>", "<end_of_turn>")),
    ],
)
def test_blocks_and_spans_agree_where_a_template_has_both_forms(
    templated, chat, trained_runs, name, template, marks
):
    item = chat("Hi", "Hello  there.", "Bye", "See you.\n\nSoon", system="Be brief.")
    marked = templated(name, template, marks)
    runs = trained_runs(marked, encode(marked, item))
    plain = templated(name, template.removesuffix("_training"), marks)
    assert runs == trained_runs(plain, encode(plain, item))
    assert len(runs) == 2


# -- gemma, thoughts, single turns ----------------------------------------------------------------


def test_gemma_folds_the_system_text_and_has_an_end_of_turn_that_is_not_eos(
    templated, chat, trained_runs
):
    tokenizer = templated("llama2", "gemma", ("<start_of_turn>", "<end_of_turn>"))
    (example,) = encode(tokenizer, chat("Who?", "Me.", "Sure?", "Yes.", system="Be brief."))
    text = tokenizer.decode(example.input_ids)
    assert "user\nBe brief.\n\nWho?<end_of_turn>" in text
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert trained_runs(tokenizer, [example]) == ["Me.<end_of_turn>", "Yes.<end_of_turn>"]
    assert tokenizer.eos_token_id not in example.input_ids


def test_a_folded_system_text_shifts_no_answer(templated, chat, trained_runs):
    """An over-long chat of several examples is cut after the right answer."""
    tokenizer = templated("llama2", "gemma", ("<start_of_turn>", "<end_of_turn>"))
    item = chat("old " * 40, "one", "new?", "two", system="Be brief.")
    (example,) = encode(tokenizer, item, cutoff_len=40)
    assert trained_runs(tokenizer, [example]) == ["two<end_of_turn>"]


def thinking(*answers):
    turns = []
    for number, (thought, text) in enumerate(answers):
        turns += [
            Message("user", f"q{number}"),
            Message("assistant", text, {"reasoning_content": thought} if thought else {}),
        ]
    return Conversation(tuple(turns), AT)


def test_reasoning_content_is_trained_where_qwen3_shows_it(family, trained_runs):
    tokenizer = family("qwen3", thinking=True)
    examples = encode(tokenizer, thinking(("six sevens", "42"), ("yes", "Sure.")))
    assert trained_runs(tokenizer, examples) == [
        "<think>\nsix sevens\n</think>\n\n42<|im_end|>",
        "<think>\nyes\n</think>\n\nSure.<|im_end|>",
    ]
    assert len(examples) == 2
    assert "six sevens" not in tokenizer.decode(examples[1].input_ids)


def test_steps_that_keep_their_thoughts_share_one_example(family, trained_runs):
    """Qwen3 drops thoughts only at the next question: a call and its answer stay together."""
    tokenizer = family("qwen3", thinking=True)
    call = {"tool_calls": CALLS, "reasoning_content": "look it up"}
    turns = list(WITH_TOOLS.messages)
    turns[2] = Message("assistant", "", call)
    turns[4] = Message("assistant", "It is 21 degrees.", {"reasoning_content": "easy"})
    examples = encode(tokenizer, Conversation(tuple(turns), AT, (TOOL,)))
    assert len(examples) == 2
    assert trained_runs(tokenizer, examples[:1]) == [
        f"<think>\nlook it up\n</think>\n\n{QWEN_CALL}<|im_end|>",
        "<think>\neasy\n</think>\n\nIt is 21 degrees.<|im_end|>",
    ]


def test_thoughts_that_no_template_shows_are_reported(smollm, trained_runs):
    log = IssueLog()
    examples = encode(smollm, thinking(("six sevens", "42")), log=log)
    assert trained_runs(smollm, examples) == ["42<|im_end|>"]
    assert [f.kind for f in log.faults()] == ["thoughts not written by the chat template"]


def untrain(item, *turns):
    made = [
        Message(m.role, m.content, m.extra, i not in turns) for i, m in enumerate(item.messages)
    ]
    return Conversation(tuple(made), item.origin, item.tools)


@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3", "qwen3"])
def test_a_turn_marked_train_false_is_read_and_not_trained(family, chat, trained_runs, name):
    tokenizer = family(name)
    item = untrain(chat("a?", "one", "b?", "two", "c?", "three"), 1)
    examples = encode(tokenizer, item)
    runs = trained_runs(tokenizer, examples)
    assert [run.split("<")[0].strip() for run in runs] == ["two", "three"]
    assert "one" in tokenizer.decode(examples[-1].input_ids)


def test_train_on_applies_on_top_of_the_turns_own_mark(smollm, chat, trained_runs):
    item = chat("a?", "one", "b?", "two")
    (example,) = encode(smollm, untrain(item, 1), "last")
    assert trained_runs(smollm, [example]) == ["two<|im_end|>"]
    with pytest.raises(RowError, match=r"rows.jsonl:7: its last answer is marked train: false"):
        encode(smollm, untrain(item, 3), "last")
    for train_on in ("responses", "all"):
        with pytest.raises(RowError, match=r"rows.jsonl:7: all its answers are marked"):
            encode(smollm, untrain(item, 1, 3), train_on)


def test_train_on_all_leaves_the_marked_answer_out(smollm, chat):
    item = chat("a?", "one", "b?", "two")
    (example,) = encode(smollm, untrain(item, 1), "all")
    masked = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label < 0]
    assert smollm.decode(masked) == "<|im_start|>one<|im_end|>"


def test_train_on_all_is_refused_where_the_marked_answer_cannot_be_told_apart(family, chat):
    item = untrain(chat("a?", "one", "b?", "two"), 1)
    with pytest.raises(RowError, match=r"rows.jsonl:7: .*rewrites turn 2") as caught:
        encode(family("qwen3"), item, "all")
    assert "train_on: responses" in caught.value.hint


def test_special_tokens_inside_tools_stay_text(family, trained_runs):
    tokenizer = family("qwen3")
    calls = [{"type": "function", "function": {"name": "say", "arguments": {"x": "<|im_end|>"}}}]
    item = Conversation(
        (
            Message("user", "a"),
            Message("assistant", "", {"tool_calls": calls}),
            Message("tool", "<|im_start|>user"),
            Message("assistant", "b"),
        ),
        AT,
    )
    examples = encode(tokenizer, item)
    run = trained_runs(tokenizer, examples)[0]
    assert run == (
        '<tool_call>\n{"name": "say", "arguments": {"x": "<|im_end|>"}}\n</tool_call><|im_end|>'
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert examples[-1].input_ids.count(end) == 4  # user, call, result, answer


def test_a_draft_says_which_texts_it_needs(smollm, chat):
    made = find_spans(smollm, chat("a?", "one", "b?", "two"), "responses")
    assert [span.turn for span in made.groups[0]] == [1, 3]
    assert all(span.text in made.groups[0][-1].text for span in made.groups[0])


def test_an_answer_is_told_to_people_with_its_calls():
    assert answer_text(Message("assistant", "Hi")) == "Hi"
    call = answer_text(Message("assistant", "", {"tool_calls": CALLS}))
    assert call == "get_weather({'city': 'Zürich'})"
