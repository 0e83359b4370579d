"""Of several answers, blocks, calls and marks each has its own mask, and each is checked."""

import copy

import pytest

from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import FatalRowError, IssueLog, RowError
from lorakit.data.tokenize.encode import EncodeConfig, encode, encode_many
from lorakit.data.tokenize.example_checks import verify_example
from lorakit.types import IGNORE, Conversation, Document, Example, Message, Origin

AT = Origin("rows.jsonl", 7)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(item, *turns):
    """`item` with these turns marked train: false."""
    made = [
        Message(m.role, m.content, m.extra, i not in turns) for i, m in enumerate(item.messages)
    ]
    return Conversation(tuple(made), item.origin, item.tools)


def encoded(tokenizer, item, train_on="responses", **rules):
    """(examples or fault, what was counted)."""
    log = IssueLog()
    ((_, made),) = encode_many(tokenizer, [item], EncodeConfig(train_on, **rules), log)
    return made, {(f.kind, f.action): f.count for f in log.faults()}


def test_every_gap_between_blocks_is_left_out(smollm, chat, trained_runs):
    smollm.chat_template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}"
        "Note:\n{% generation %}Well{% endgeneration %}\n--\n{% generation %}so{% endgeneration %}"
        "\n--\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}",
    )
    resolve_template(smollm, "some/model")
    runs = trained_runs(smollm, encode(smollm, chat("a?", "one", "b?", "two")))
    assert runs == ["Well", "so", "one<|im_end|>", "Well", "so", "two<|im_end|>"]


def test_train_on_all_leaves_every_marked_answer_out(smollm, chat):
    item = marked(chat("a?", "one", "b?", "two", "c?", "three"), 1, 3)
    (example,) = encode(smollm, item, "all")
    masked = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label < 0]
    assert smollm.decode(masked) == "<|im_start|>one<|im_end|>two<|im_end|>"


def test_each_call_of_a_turn_must_be_written(smollm):
    """This template writes the first call of a turn only."""
    smollm.chat_template = "{{ tools or '' }}" + CHATML.replace(
        "<|im_end|>",
        "{% for c in (m.tool_calls or [])[:1] %}{{ c.function | tojson }}{% endfor %}<|im_end|>",
    )
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("find", "open")]
    for made, missing in ((calls, "open"), (calls[::-1], "find")):
        turns = (Message("user", "a"), Message("assistant", "", {"tool_calls": made}))
        with pytest.raises(RowError, match=f"does not write the call of {missing}"):
            encode(smollm, Conversation(turns, AT))
        encode(
            smollm, Conversation((turns[0], Message("assistant", "", {"tool_calls": made[:1]})), AT)
        )


@pytest.mark.parametrize(
    ("switch", "thought"), [("enable_thinking", "hm"), ("not enable_thinking", "")]
)
def test_the_prompt_is_that_of_the_thinking_mode_in_which_the_answer_is_written(
    smollm, trained_runs, switch, thought
):
    """Without a word on thinking its prompt is one that no answer of this row begins with."""
    smollm.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>"
        "{% if enable_thinking is defined and " + switch + " %}{{ '\n' }}{% else %} I {% endif %}"
        "{% endif %}"
    )
    answer = Message("assistant", "42", {"reasoning_content": thought} if thought else {})
    examples = encode(smollm, Conversation((Message("user", "6 x 7?"), answer), AT))
    assert trained_runs(smollm, examples) == [f"{thought}\n</think>\n\n42<|im_end|>"]


# -- templates that make an example of each answer -------------------------------------------------

# Old thoughts are dropped, and a third turn is begun with a second BOS.
FORGETS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_example_of_a_chat_is_verified(smollm, chat):
    """Two BOS tokens in its second example alone."""
    tokenizer = copy.deepcopy(smollm)
    tokenizer.bos_token = "<|endoftext|>"
    item = chat("a?", "<think>hm</think>one", "b?", "<think>so</think>two")
    tokenizer.chat_template = FORGETS
    assert len(encode(tokenizer, item)) == 2
    again = "{% if messages | length > 2 %}{{ bos_token }}{% endif %}"
    tokenizer.chat_template = again + FORGETS
    with pytest.raises(FatalRowError, match=r"rows.jsonl:7: it begins with two BOS"):
        encode(tokenizer, item)


def test_too_long_error_stops_at_any_answer_of_a_chat(family, chat):
    tokenizer = family("qwen3", thinking=True)
    thoughts = ("<think>\nhm\n</think>\n\none", "<think>\nso\n</think>\n\n" + "two " * 60)
    for answers in (thoughts, thoughts[::-1]):
        item = chat("a?", answers[0], "b?", answers[1])
        with pytest.raises(FatalRowError, match=r"rows.jsonl:7: too long: \d+ tokens"):
            encode(tokenizer, item, cutoff_len=60, on_overlength="error")


# -- too long --------------------------------------------------------------------------------------


def test_split_keeps_answers_that_are_not_trained_as_context_or_leaves_them_out(
    smollm, chat, trained_runs
):
    texts = [f"{'Why' if i % 2 == 0 else 'It is'} number {i} here?" for i in range(12)]
    whole = chat(*texts)
    for untrained in ((1, 3, 5), (3,), (11,), (1, 11)):
        made, faults = encoded(
            smollm, marked(whole, *untrained), cutoff_len=60, on_overlength="split"
        )
        expected = [f"{texts[i]}<|im_end|>" for i in range(1, 12, 2) if i not in untrained]
        assert trained_runs(smollm, made) == expected
        assert faults == {("too long", "split into several examples"): 1}


def test_split_keeps_what_comes_before_a_trained_answer(smollm, chat):
    """Two exchanges that are not trained, and a third that is: they fit, and stand together."""
    item = marked(chat(*(f"number {i} here?" for i in range(12)), system="S"), 2, 4)
    made, _ = encoded(smollm, item, cutoff_len=70, on_overlength="split")
    assert len(made) > 1
    assert all(f"number {i} here?" in smollm.decode(made[0].input_ids) for i in range(6))


def test_split_makes_one_example_where_only_the_last_answer_is_trained(smollm, chat, trained_runs):
    item = chat(*(f"number {i} here?" for i in range(12)))
    made, _ = encoded(smollm, item, "last", cutoff_len=60, on_overlength="split")
    assert trained_runs(smollm, made) == ["number 11 here?<|im_end|>"]


def test_the_overlap_of_documents_is_a_quarter_of_the_limit_at_most(smollm):
    text = "\n\n".join(f"Paragraph {i} says that {i * i} is its number." for i in range(30))
    made, _ = encoded(smollm, Document(text, AT), cutoff_len=64, on_overlength="drop", overlap=60)
    context = [example.labels.count(IGNORE) for example in made[1:]]
    assert len(context) > 3
    assert set(context) == {16}


# -- verify_example looks at every answer ---------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_answer_may_lose_its_end_of_turn(smollm, chat, number):
    (good,) = encode(smollm, chat("a?", "one", "b?", "two", "c?", "three"))
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    place = [i for i, label in enumerate(good.labels) if label == end][number]
    labels = [IGNORE if i == place else label for i, label in enumerate(good.labels)]
    word = ("one", "two", "three")[number]
    with pytest.raises(FatalRowError, match=f"rows.jsonl:7: a trained part ends with '{word}'"):
        verify_example(smollm, Example(good.input_ids, labels, AT))
